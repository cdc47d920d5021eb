"""``ovm pause``."""

from __future__ import annotations

import click

from ovm.cli import json_option
from ovm.cli import service as services
from ovm.cli.names import name_argument


@click.command("pause")
@name_argument
@json_option
def command(name: str, *, as_json: bool) -> None:
    """Let the machine NAME stand still; fine if it does. Its containers notice nothing but the time that has passed."""
    state = services.of(name).pause()
    if as_json:
        services.print_json(state)
    else:
        click.echo(f"{name} is {services.spoken(state.state)}")
