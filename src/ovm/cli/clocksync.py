"""``ovm clocksync``."""

from __future__ import annotations

import click

from ovm.cli import json_option
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json


@click.command("clocksync")
@name_argument
@json_option
def command(name: str, *, as_json: bool) -> None:
    """Set the clock of the machine NAME from this host's, and verify it."""
    synced = services.of(name).clocksync()
    if as_json:
        say_json(synced)
        return
    from ovm.guest.clock import spoken

    before, after = spoken(synced.offset_before_s), spoken(synced.offset_after_s)
    say(f"the clock of {name} was {before} off and is now {after} off")
