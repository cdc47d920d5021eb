"""``ovm clocksync``."""

from __future__ import annotations

import click

from ovm.cli import json_option
from ovm.cli import service as services
from ovm.cli.names import name_argument


@click.command("clocksync")
@name_argument
@json_option
def command(name: str, *, as_json: bool) -> None:
    """Set the clock of the machine NAME to this host's, and verify it."""
    synced = services.of(name).clocksync()
    if as_json:
        services.print_json(synced)
        return
    before, after = (offset * 1000 for offset in (synced.offset_before_s, synced.offset_after_s))
    click.echo(f"the clock of {name} was {before:+.1f} ms off, now it is {after:+.1f} ms off")
