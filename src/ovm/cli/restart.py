"""``ovm restart``."""

from __future__ import annotations

import contextlib

import click

from ovm.cli import Ui, json_option
from ovm.cli.names import name_argument


@click.command("restart")
@name_argument
@json_option
@click.pass_obj
def command(ui: Ui, /, name: str, *, as_json: bool) -> None:
    """Shut the machine NAME down and boot it again, with its current settings."""
    from ovm.cli.start import start
    from ovm.cli.stop import stop
    from ovm.errors import InUseError
    from ovm.registry import machines, removal

    machine = machines.find(name)
    stop(ui, name)
    with contextlib.suppress(InUseError):  # another command started it meanwhile
        removal.forget_memory(machine)
    start(ui, machine, as_json=as_json)
