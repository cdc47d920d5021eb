"""``ovm reset``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ovm.cli import Ui, run
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say

if TYPE_CHECKING:
    from ovm.registry.machines import Machine


@click.command("reset")
@name_argument
@click.option("--data", is_flag=True, help="Also remove the data disk, with every image, container and volume.")
@click.option("-y", "--yes", is_flag=True, help="Skip the confirmation.")
@click.pass_obj
def command(ui: Ui, /, name: str, *, data: bool, yes: bool) -> None:
    """Restore the files that the machine NAME boots from. Its images, containers and volumes are kept.

    A running machine is restarted.
    """
    from ovm.cli.progress import steps
    from ovm.errors import StateError
    from ovm.registry import machines

    machine = machines.find(name)
    if data and not yes:
        _ask(machine)
    with steps(ui.progress).step(f"resetting {name}"):
        try:
            services.of(name).reset(data=data)
        except StateError:
            machines.refuse_others(machine)
            run(_reset(machine, data=data))


async def _reset(machine: Machine, *, data: bool) -> None:
    from ovm.registry.create import create_from_settings

    made = await create_from_settings(machine)
    await made.reset_path(data=data)


def _ask(machine: Machine) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(
            "this removes data permanently, and there is no terminal for a confirmation; add --yes to confirm"
        )
    say(f"This permanently removes every image, container and volume of {machine.name}.", err=True)
    click.confirm("Continue?", abort=True, err=True)
