"""``ovm status``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ovm.cli import EXIT_NOT_SO, json_option
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json
from ovm.cli.output import filled, format_option

if TYPE_CHECKING:
    from ovm.registry.machines import Machine
    from ovm.service.protocol import Status

ENDING_S = 2.0
"""By then the service of a stopped machine has ended, or it is about to start the machine again."""


@click.command("status")
@name_argument
@json_option
@format_option
def command(name: str, *, as_json: bool, template: str | None) -> int:
    """Show the state of the machine NAME. The exit status is 0 if it runs, otherwise 3."""
    import msgspec

    from ovm.errors import StateError
    from ovm.model.states import VMState
    from ovm.registry import machines

    machine = machines.find(name)
    try:
        _, status = services.asked(name)
        if status.state is VMState.STOPPED and _has_ended(machine):  # its files record how
            raise StateError(f"{name} is not running")
    except StateError:
        why = services.why_it_rests(machine)
        told: dict[str, object] = {"name": name, "state": VMState.STOPPED.value, "why": why}
        error = services.failure(machines.at_rest(machine))
        if error is not None:
            told["error"] = error
        if as_json:
            say_json(told)
        elif template is not None:
            filled(told, template)
        else:
            message, *evidence = services.in_full(error) if error else [""]
            say(f"{name} is stopped (failed): {message}" if error else f"{name} is {why}")
            for line in evidence:
                say(line)
        return EXIT_NOT_SO
    if as_json:
        say_json(status)
    elif template is not None:
        filled(msgspec.to_builtins(status), template)
    else:
        _show(status)
    return 0 if status.state is VMState.RUNNING else EXIT_NOT_SO


def _has_ended(machine: Machine) -> bool:
    """Return whether the service ends within ``ENDING_S``; during a reset it does not."""
    from ovm.errors import StopError
    from ovm.service import launch

    try:
        launch.wait_until_gone(machine, timeout_s=ENDING_S)
    except StopError:
        return False
    return True


def _show(status: Status) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.started_at))
    say(f"{status.name} is {services.spoken(status.state)}; its service is process {status.pid}, since {since}")
    if status.step:
        say(f"  step: {status.step}")
    for problem in status.health.problems if status.health else ():
        say(f"  health problem: {problem}")
    if status.restart_needed:
        changed = ", ".join(status.restart_needed)
        say(f"  changed since its start: {changed}; apply with: ovm restart {status.name}")
