"""``ovm suspend``."""

from __future__ import annotations

import click

from ovm.cli import Ui
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say


@click.command("suspend")
@name_argument
@click.pass_obj
def command(ui: Ui, /, name: str) -> None:
    """Save the state of the machine NAME to disk, and end its processes; does nothing if it is suspended.

    The next `ovm start` resumes the machine and its containers in about a second. If the machine changed meanwhile,
    it boots instead, as after a power failure.
    """
    from ovm.cli.progress import steps
    from ovm.errors import StateError
    from ovm.registry import machines
    from ovm.service import launch

    machine = machines.find(name)
    try:
        service = services.of(name)
    except StateError:
        machines.refuse_others(machine)
        if machines.at_rest(machine).state != "suspended":
            raise
        say(f"{name} is {services.why_it_rests(machine)}", err=True)
        return
    with steps(ui.progress).step(f"suspending {name}"):
        service.suspend()
        launch.wait_until_gone(machine)
