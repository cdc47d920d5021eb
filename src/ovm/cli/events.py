"""``ovm events``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ovm.cli import json_option
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json
from ovm.cli.output import filled, format_option

if TYPE_CHECKING:
    from ovm.model.events import Event


@click.command("events")
@name_argument
@click.option("-f", "--follow", is_flag=True, help="Print new events until the machine stops.")
@click.option("--after", type=click.IntRange(0), default=0, help="Print only events with a higher number.")
@json_option
@format_option
def command(name: str, *, follow: bool, after: int, as_json: bool, template: str | None) -> None:
    """Show the events of the running machine NAME since its start.

    With --json, each event is one line of JSON.
    """
    from ovm.wire import codec

    for told in services.of(name).events(after=after, follow=follow):
        if as_json:
            say_json(told)
        elif template is not None:
            filled(codec.builtins(told), template)
        else:
            say(_line(told))


def _line(told: Event) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told.at))
    words = told.step
    if told.error is not None:
        words = told.error.message
    elif told.health is not None:
        words = "; ".join(told.health.problems) or "healthy again"
    return f"{told.id:>5}  {when}  {told.name:<8}  {words}".rstrip()
