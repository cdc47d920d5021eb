"""``ovm stop``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ovm.cli import Ui
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say
from ovm.model.defaults import STOP_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from ovm.registry.machines import Machine

FORCED_GONE_S = 15.0
"""Deadline for a service to end after it reports that it cut the power."""


def _seconds(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    from ovm.model.validation import check_seconds

    return None if value is None else check_seconds("--timeout", value)


@click.command("stop")
@name_argument
@click.option(
    "--force",
    is_flag=True,
    help="Cut the power at once; unwritten data is lost. Also works if the service does not answer.",
)
@click.option(
    "--timeout",
    type=float,
    callback=_seconds,
    help=f"Seconds the guest may take to shut down.  [default: {STOP_TIMEOUT_S:.0f}]",
)
@click.pass_obj
def command(ui: Ui, /, name: str, *, force: bool, timeout: float | None) -> None:
    """Shut the machine NAME down; does nothing if it is down. Cancels a start in progress."""
    stop(ui, name, force=force, timeout_s=timeout)


def stop(ui: Ui, name: str, *, force: bool = False, timeout_s: float | None = None) -> None:
    """Shut the machine down and show progress."""
    from ovm.cli.progress import steps
    from ovm.registry import machines

    machine = machines.find(name)
    if machines.at_rest(machine).held_by != "service":
        machines.refuse_others(machine)
        say(f"{name} is {services.why_it_rests(machine)}", err=True)
        return
    with steps(ui.progress).step(f"stopping {name}") as advance:
        if force:
            _cut_power(machine)
        else:
            _shut_down(machine, lambda step: advance(step, 0, 0), STOP_TIMEOUT_S if timeout_s is None else timeout_s)


def _shut_down(machine: Machine, progress: Callable[[str], object], timeout_s: float) -> None:
    from ovm.errors import SkewError, StateError
    from ovm.registry import machines
    from ovm.service import holder, launch

    try:
        service = launch.listening(machine)
        with launch.following(service, progress):
            service.stop(timeout_s=timeout_s)
    except SkewError as error:  # services of all versions obey signals
        say(f"ovm: {error.message}; stopping it with a signal", err=True)
        holder.end(machine, force=False)
    except StateError:
        if machines.at_rest(machine).state == "crashed":
            raise
    launch.wait_until_gone(machine)


def _cut_power(machine: Machine) -> None:
    """Cut the power by a request to the service or, if that fails, by signals to the process that holds its lock."""
    from ovm.errors import OVMError, StopError
    from ovm.service import holder, launch
    from ovm.service.client import Service

    try:
        service = Service(machine.name, machine.service_socket)
        service.status()
        service.stop(force=True, timeout_s=0)
        launch.wait_until_gone(machine, timeout_s=FORCED_GONE_S)
    except OVMError as error:
        if not isinstance(error, StopError):
            say(f"ovm: {error.message}", err=True)
        holder.end(machine)
