"""``ovm start``: a machine in the foreground, for as long as the command runs."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ovm.cli import EXIT_INTERRUPTED, Ui, colour, json_option, run

if TYPE_CHECKING:
    from ovm.cli.progress import Steps
    from ovm.config import Mount
    from ovm.errors import OVMError
    from ovm.info import Health, Info
    from ovm.machine import OVM

EXIT_TERMINATED = 143
"""What a shell reports for a program ended by SIGTERM."""
SAME_SIGNAL_S = 1.0
"""Wrappers pass on a signal that the terminal has sent us already; what follows so soon is not a second wish."""

_MEMORY = re.compile(r"(\d+)\s*([MG]?)(?:i?B)?", re.IGNORECASE)


def parse_memory(text: str) -> int:
    """``2048``, ``2048M`` or ``2G`` in MiB."""
    found = _MEMORY.fullmatch(text.strip())
    if not found:
        raise click.BadParameter(f"{text!r} is no size; write 2048, 2048M or 2G")
    return int(found[1]) * (1024 if found[2].upper() == "G" else 1)


def parse_mount(text: str) -> Mount:
    """``HOST[:GUEST][:ro]``; a relative HOST is taken from the working directory, as a shell would."""
    from ovm.config import Mount
    from ovm.errors import OptionError

    host, *rest = text.split(":")
    read_only = rest[-1:] == ["ro"]
    guest = rest[:-1] if rest[-1:] in (["ro"], ["rw"]) else rest
    if not host or len(guest) > 1 or guest == [""]:
        raise click.BadParameter(f"{text!r} is not HOST[:GUEST][:ro]")
    try:
        return Mount(Path(host).expanduser().absolute(), guest[0] if guest else "", read_only)
    except OptionError as error:
        raise click.BadParameter(error.message) from error


@click.command("start")
@click.argument("name", default="default")
@click.option("--foreground", is_flag=True, help="Run the machine until Ctrl-C.")
@click.option("--cpus", type=click.IntRange(1, 255), help="Virtual CPUs.  [default: half the host's]")
@click.option("--memory", type=parse_memory, metavar="SIZE", help="Memory: 2048, 2048M or 2G.  [default: 2G]")
@click.option(
    "--mount",
    "mounts",
    type=parse_mount,
    metavar="HOST[:GUEST][:ro]",
    multiple=True,
    help="Show a folder of the host in the guest; can be given several times.",
)
@click.option("--podman-tcp", is_flag=True, help="Podman's API on a TCP port of this host's loopback, too.")
@click.option("--image", type=click.Path(path_type=Path), help="The directory of a guest image.")
@json_option
@click.pass_obj
def command(ui: Ui, /, name: str, foreground: bool, image: Path | None, as_json: bool, **given: Any) -> int:
    """Boot the machine NAME and say how to reach its engine.

    The first start fetches the guest image that was released with ovm, or builds one, which takes a minute or two.
    """
    if not foreground:
        raise click.UsageError("a machine runs as long as the command that started it: add --foreground")
    from ovm.cli.progress import steps

    options = {
        "memory_mib" if key == "memory" else key: value
        for key, value in given.items()
        if value is not None and value is not False and value != ()  # 0 is a value, and a wrong one
    }
    return run(_start(name, image, options, steps(ui.progress), as_json=as_json))


async def _start(name: str, image: Path | None, options: dict[str, Any], steps: Steps, *, as_json: bool) -> int:
    signals = Signals()
    machine = await signals.unless_stopped(_boot(name, image, options, steps))
    if machine is None:
        return signals.status
    failed: list[OVMError] = []
    machine.on("error", failed.append)
    machine.on("ready", failed.clear)  # it has got over them
    machine.on("health", partial(_tell_health, name))
    _announce(name, machine.info, as_json=as_json)
    if not await _closes_before(signals, machine):
        with steps.step(f"stopping {name}") as advance:
            await _stop(machine, signals, lambda step: advance(step, 0, 0))
        return 0
    if failed:
        raise failed[-1]
    click.echo(f"{name} has powered itself off", err=True)
    return 0


async def _closes_before(signals: Signals, machine: OVM) -> bool:
    """Whether the machine goes down for good before a signal comes; one whose network was lost may start again."""
    from ovm.state import VMState

    closed = asyncio.Event()
    machine.on("close", closed.set)
    while True:
        await signals.wait(closed)
        if not closed.is_set():
            return False
        if machine.state is VMState.STOPPED:
            return True
        closed.clear()


def _tell_health(name: str, health: Health) -> None:
    click.echo(f"{name}: {'; '.join(health.problems) or 'all is well again'}", err=True)


async def _boot(name: str, image: Path | None, options: dict[str, Any], steps: Steps) -> OVM:
    from ovm import create_ovm, registry

    if image is None and not await asyncio.to_thread(_has_image, registry.default_image_dir(registry.host_arch())):
        await _provide_image(steps)
    with steps.step(f"preparing {name}") as advance:
        machine = await create_ovm(name, image=image, progress=advance, **options)
    with steps.step(f"booting {name}"):
        await machine.start()
    return machine


async def _provide_image(steps: Steps) -> None:
    """Fetch the released image, or build one; where neither can be done, the error says what can."""
    from ovm import image, registry

    if sys.platform != "linux" or registry.is_released(registry.host_arch()):
        with steps.step("fetching the guest image") as advance:
            await image.pull_image(image.PullOptions(), progress=advance)
        return
    with steps.step("building the guest image") as advance:
        await image.build_image(image.BuildOptions(), progress=lambda stage, _detail: advance(stage, 0, 0))


def _has_image(directory: Path) -> bool:
    """A damaged image is not built over: whoever loads it says what is wrong."""
    from ovm.registry import IMAGE_MANIFEST

    return (directory / IMAGE_MANIFEST).exists()


async def _stop(machine: OVM, signals: Signals, progress: Callable[[str], object]) -> None:
    stopping = asyncio.create_task(machine.stop(progress=progress))
    again = asyncio.create_task(signals.again.wait())
    await asyncio.wait({stopping, again}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        await machine.stop(force=True)
    again.cancel()
    await stopping


def _announce(name: str, info: Info, *, as_json: bool) -> None:
    if as_json:
        import msgspec

        fields = {"name": name, "docker_host": info.docker_host} | msgspec.to_builtins(info, enc_hook=str)
        print(msgspec.json.encode(fields).decode(), flush=True)
        return
    took = info.timings[-1].ms / 1000 if info.timings else 0
    for stage in info.timings:
        click.echo(click.style(f"  {stage.ms / 1000:5.1f} s  {stage.name}", dim=True), err=True, color=colour())
    click.echo(f"{name} is ready after {took:.1f} s ({info.accelerator}: {info.accelerator_reason})", err=True)
    click.echo("In another shell, for docker and whatever speaks its API, and for podman --remote:\n", err=True)
    address = click.style(info.docker_host, bold=True)
    for variable in ("DOCKER_HOST", "CONTAINER_HOST"):
        click.echo(f"  export {variable}={address}", color=colour())
    click.echo("", err=True)
    click.echo("Ctrl-C stops it.", err=True)


class Signals:
    """Ctrl-C and SIGTERM: the first asks to stop, the second no longer asks."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.again = asyncio.Event()
        self.status = 0
        self._first_at = 0.0
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._caught, EXIT_INTERRUPTED)
        loop.add_signal_handler(signal.SIGTERM, self._caught, EXIT_TERMINATED)

    def _caught(self, status: int) -> None:
        now = time.monotonic()
        if not self.first.is_set():
            self.first.set()
            self.status, self._first_at = status, now
        elif now - self._first_at >= SAME_SIGNAL_S:
            self.again.set()

    async def unless_stopped(self, work: Any) -> Any:
        """The result of ``work``; None if it was cancelled because of a signal. It has then cleaned up."""
        task = asyncio.ensure_future(work)
        stop = asyncio.create_task(self.first.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            return task.result()
        task.cancel()
        try:
            return await task  # it may just have been done
        except asyncio.CancelledError:
            return None

    async def wait(self, other: asyncio.Event) -> None:
        """Until a signal or ``other`` comes."""
        waits = {asyncio.create_task(self.first.wait()), asyncio.create_task(other.wait())}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
