"""``ovm rm``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ovm.cli import service as services
from ovm.cli.names import complete
from ovm.cli.outlet import say

if TYPE_CHECKING:
    from ovm.registry.machines import Machine


@click.command("rm")
@click.argument("name", nargs=-1, required=True, shell_complete=complete)
@click.option("-y", "--yes", is_flag=True, help="Skip the confirmation.")
def command(name: tuple[str, ...], *, yes: bool) -> None:
    """Remove machines with their images, containers and volumes. Refuses if one of them is running."""
    from ovm import integrations
    from ovm.errors import OVMError
    from ovm.integrations import autostart
    from ovm.paths import SocketPaths
    from ovm.registry import machines, removal

    doomed = [machines.find(one) for one in dict.fromkeys(name)]
    for machine in doomed:  # all or none
        machines.refuse_running(machine)
    if not yes:
        _ask(doomed)
    for machine in doomed:
        problems = list(integrations.remove(machine.name, SocketPaths(machine.socket_dir).podman).problems)
        try:
            autostart.remove(machine.name)
        except OVMError as error:
            problems.append(error)
        removal.remove(machine)
        for problem in problems:
            say(*f"ovm: {problem}".split("\n"), err=True)
        say(f"removed {machine.name}", err=True)


def _ask(doomed: list[Machine]) -> None:
    from ovm.registry import machines

    if not sys.stdin.isatty():
        raise click.UsageError(
            "this removes data permanently, and there is no terminal for a confirmation; add --yes to confirm"
        )
    for machine in doomed:
        used = machines.at_rest(machine).disk_bytes or 0
        size = services.bytes_in_words(used)
        say(f"This permanently removes {machine.name} with all images, containers and volumes ({size}).", err=True)
    click.confirm("Continue?", abort=True, err=True)
