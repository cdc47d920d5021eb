"""``ovm stop``."""

from __future__ import annotations

import click

from ovm.cli import Ui
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say


@click.command("stop")
@name_argument
@click.option("--force", is_flag=True, help="Cut the power at once: what was not yet written is lost.")
@click.option("--timeout", type=click.FloatRange(0), help="Seconds the guest may take to shut down.  [default: 90]")
@click.pass_obj
def command(ui: Ui, /, name: str, *, force: bool, timeout: float | None) -> None:
    """Shut the machine NAME down; fine if it is. One that is just starting gives that up."""
    stop(ui, name, force=force, timeout_s=timeout)


def stop(ui: Ui, name: str, *, force: bool = False, timeout_s: float | None = None) -> None:
    """Shut it down, showing how that goes."""
    from ovm import machines
    from ovm.cli.progress import steps
    from ovm.errors import StateError
    from ovm.service import launch
    from ovm.service.protocol import STOP_TIMEOUT_S

    machine = machines.find(name)
    try:
        service = services.of(name)
    except StateError:
        machines.refuse_others(machine)
        say(f"{name} is {services.why_it_rests(machine)}", err=True)
        return
    with (
        steps(ui.progress).step(f"stopping {name}") as advance,
        launch.following(service, lambda step: advance(step, 0, 0)),
    ):
        service.stop(force=force, timeout_s=STOP_TIMEOUT_S if timeout_s is None else timeout_s)
        launch.wait_until_gone(machine)
