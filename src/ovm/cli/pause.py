"""``ovm pause``."""

from __future__ import annotations

import click

from ovm.cli import json_option
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json


@click.command("pause")
@name_argument
@json_option
def command(name: str, *, as_json: bool) -> None:
    """Pause the machine NAME; does nothing if it is paused. Its containers notice only that time has passed."""
    state = services.of(name).pause()
    if as_json:
        say_json(state)
    else:
        say(f"{name} is {services.spoken(state.state)}")
