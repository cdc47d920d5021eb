"""``ovm stop``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ovm.cli import Ui
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from ovm.registry.machines import Machine

FORCED_GONE_S = 15.0
"""A service that says it has cut the power is gone by then, or is not what answered."""


def _seconds(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    from ovm.model.validation import check_seconds

    return None if value is None else check_seconds("--timeout", value)


@click.command("stop")
@name_argument
@click.option(
    "--force",
    is_flag=True,
    help="Cut the power at once: what was not yet written is lost. Works on a service that does not answer, too.",
)
@click.option(
    "--timeout", type=float, callback=_seconds, help="Seconds the guest may take to shut down.  [default: 90]"
)
@click.pass_obj
def command(ui: Ui, /, name: str, *, force: bool, timeout: float | None) -> None:
    """Shut the machine NAME down; fine if it is. One that is just starting gives that up."""
    stop(ui, name, force=force, timeout_s=timeout)


def stop(ui: Ui, name: str, *, force: bool = False, timeout_s: float | None = None) -> None:
    """Shut it down, showing how that goes."""
    from ovm.cli.progress import steps
    from ovm.model.defaults import STOP_TIMEOUT_S
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
    except SkewError as error:  # signals are understood by services of all versions
        say(f"ovm: {error.message}; it is stopped by a signal", err=True)
        holder.end(machine, force=False)
    except StateError:
        if machines.at_rest(machine).state == "crashed":
            raise
    launch.wait_until_gone(machine)


def _cut_power(machine: Machine) -> None:
    """By its service's answer, or else by the service's lock and identity."""
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
