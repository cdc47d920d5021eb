"""The one outlet of ``ovm``: whatever a command prints passes here, and is made fit for a terminal on the way.

Values may come from a service, a guest or a file that somebody else wrote. What a program of the user's prints in the
guest (``ovm exec``, ``ovm ssh``) does not come by here: ssh hands it on as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from ovm.text.printable import printable


def say(*lines: str, err: bool = False) -> None:
    """Print each of ``lines`` as one line without control characters, to stdout or stderr."""
    for line in lines:
        click.echo(printable(line), err=err)


def say_styled(before: str, styled: str, after: str = "", *, err: bool = False, **style: Any) -> None:
    """Print one line of which a part has a style, such as ``bold=True`` or ``fg="red"``."""
    part = click.style(printable(styled), **style)
    click.echo(printable(before) + part + printable(after), err=err, color=colour())


def say_json(told: Any) -> None:
    """Print one line of JSON in ASCII alone: every other character is escaped."""
    import json

    from ovm.wire import codec

    text = json.dumps(codec.builtins(told))
    print(text.replace("\x7f", "\\u007f"), flush=True)


def say_filled(template: str, row: Mapping[str, Any]) -> None:
    """Print ``template``, which is the user's own, with the values of ``row`` made fit to print.

    Raises:
        LookupError, ValueError, AttributeError, TypeError: it cannot be filled in.
    """
    print(template.format(**cleaned(row)), flush=True)


def cleaned(told: Any) -> Any:
    """The same values, with every text in them on one line and without control characters."""
    match told:
        case str():
            return printable(told)
        case Mapping():
            return {cleaned(key): cleaned(value) for key, value in told.items()}
        case list() | tuple():
            return [cleaned(value) for value in told]
        case _:
            return told


def colour() -> bool | None:
    """What to tell click about colours: never where ``NO_COLOR`` is set, else its own choice."""
    return False if os.environ.get("NO_COLOR") else None
