"""``ovm resume``."""

from __future__ import annotations

import click

from ovm.cli import json_option
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json


@click.command("resume")
@name_argument
@json_option
def command(name: str, *, as_json: bool) -> None:
    """Resume the machine NAME and set its clock; does nothing if it runs."""
    state = services.of(name).resume()
    if as_json:
        say_json(state)
    else:
        say(f"{name} is {services.spoken(state.state)}")
