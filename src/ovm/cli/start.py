"""``ovm start``: start a machine that outlives the command, or with ``--foreground`` ends with it."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ovm.cli import SIGNAL_STATUS, Ui, json_option, run
from ovm.cli.names import name_argument
from ovm.cli.options import settings_options
from ovm.cli.outlet import say, say_json, say_styled
from ovm.cli.timings import Timings, timings_options

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    from ovm.cli.progress import Steps
    from ovm.errors import OVMError
    from ovm.model.info import Info
    from ovm.registry.machines import Machine
    from ovm.service.client import Service

NO_TIMINGS = Timings()


@click.command("start")
@name_argument
@click.option("--foreground", is_flag=True, help="Run in the foreground until Ctrl-C, which stops the machine.")
@timings_options
@click.option("--cold", is_flag=True, help="Boot even if suspended; deletes the saved state.")
@settings_options
@json_option
@click.pass_obj
def command(
    ui: Ui,
    /,
    name: str,
    *,
    foreground: bool,
    timings: bool,
    timeline: Path | None,
    cold: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Start the machine NAME and print how to reach its container engine. It runs until `ovm stop`, even after logout.

    A suspended machine resumes. If it changed since, it boots instead, and the command prints why.

    The first start fetches the guest image released with ovm, or builds one, which takes a minute or two.
    Options are stored in the machine's settings.
    """
    from ovm.cli import init
    from ovm.registry import machines, removal
    from ovm.registry.settings import RESTART_KEYS

    machine = machines.of(name)
    if changed := init.write(machine, given):
        say(f"set in {machine.settings_path}: {', '.join(changed)}", err=True)
        if changed.keys() & RESTART_KEYS and machines.at_rest(machine).held_by != "nobody":
            say(f"Takes effect at the next start: ovm restart {machine.name}", err=True)
    if cold:
        removal.forget_memory(machine)
    wanted = Timings(as_table=timings, picture=timeline)
    return start(ui, machine, as_json=as_json, foreground=foreground, timings=wanted)


def start(ui: Ui, machine: Machine, *, as_json: bool, foreground: bool = False, timings: Timings = NO_TIMINGS) -> int:
    """Start the machine unless it runs, show progress, and print how to reach it."""
    from ovm.cli.progress import steps

    shown = steps(ui.progress)
    provide_image(machine, shown)
    if foreground:
        from ovm.cli.foreground import stay

        def ready(info: Info) -> None:
            announce(machine, info, as_json=as_json)
            timings.show(machine, info, with_units=False)  # this process, which would query, also serves

        return stay(machine, shown, ready)
    with _given_up_by_signals():
        service, failed = _started(machine, shown)
    for error in failed:
        say(*f"ovm: {error}".split("\n"), err=True)
    info = service.info()
    announce(machine, info, as_json=as_json)
    timings.show(machine, info, with_units=True)
    if not as_json:
        say(f"To stop it: ovm stop{_argument(machine)}", err=True)
    return 0


def _started(machine: Machine, shown: Steps) -> tuple[Service, list[OVMError]]:
    from ovm.service import launch

    ours: list[Service] = []
    with shown.step(f"starting {machine.name}") as advance:
        try:
            return launch.up(machine, lambda step: advance(step, 0, 0), launched=ours.append)
        except _GivenUp:
            if ours:  # a start by another command continues
                with shown.step("undoing the start"):
                    ours[0].stop(force=True)
                    launch.wait_until_gone(machine)
            raise


class _GivenUp(KeyboardInterrupt):
    """A signal arrived before the machine was ready."""


@contextmanager
def _given_up_by_signals() -> Iterator[None]:
    def give_up(number: int, _frame: FrameType | None) -> None:
        raise _GivenUp(number)

    before = {number: signal.signal(number, give_up) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _GivenUp as given_up:
        number = given_up.args[0]
        say("ovm: interrupted; nothing that this command started is left running", err=True)
        raise click.exceptions.Exit(SIGNAL_STATUS + number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def provide_image(machine: Machine, shown: Steps) -> None:
    """Fetch the released image, or build one, unless it exists or the machine's settings name another."""
    from ovm import image
    from ovm.host import programs
    from ovm.registry import images as registry

    if machine.settings().image is not None:
        return
    directory = registry.default_image_dir(registry.host_arch())
    if (directory / registry.IMAGE_MANIFEST).exists():  # do not replace a damaged one: loading it reports the damage
        return
    run(programs.find_gvproxy())  # first: without gvproxy the image is useless
    if sys.platform != "linux" or registry.is_released(registry.host_arch()):
        with shown.step("fetching the guest image") as advance:
            run(image.pull_image(image.PullOptions(), progress=advance))
    else:
        with shown.step("building the guest image") as advance:
            run(image.build_image(image.BuildOptions(), progress=lambda stage, _detail: advance(stage, 0, 0)))


def announce(machine: Machine, info: Info, *, as_json: bool) -> None:
    """Print the variables to export on stdout, and everything else on stderr."""
    from ovm.integrations.environment import variables
    from ovm.wire import codec

    if as_json:
        say_json({"name": machine.name} | codec.builtins(info))
        return
    took = info.timings[-1].ms / 1000 if info.timings else 0
    say(f"{machine.name} is ready after {took:.1f} s ({info.accelerator}: {info.accelerator_reason})", err=True)
    if info.not_resumed:
        say(f"Could not resume ({info.not_resumed}); booted instead", err=True)
    say("To use it with docker, podman --remote and compatible tools:", "", err=True)
    wanted = variables(machine.sockets.podman)
    for variable in ("DOCKER_HOST", "CONTAINER_HOST", "DOCKER_BUILDKIT"):
        say_styled(f"  export {variable}=", shlex.quote(wanted[variable]), bold=True)
    say("", f'or, in any shell: eval "$(ovm env{_argument(machine)})"', err=True)


def _argument(machine: Machine) -> str:
    return "" if machine.name == "default" else f" {machine.name}"
