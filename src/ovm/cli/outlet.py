"""All output of ``ovm``, made safe for a terminal.

Values may come from a service, a guest or another user's file. The output of ``ovm exec`` and ``ovm ssh`` does not
pass through this module: ssh prints it unchanged.
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
    """Print one line in which ``styled`` has a style, such as ``bold=True`` or ``fg="red"``."""
    part = click.style(printable(styled), **style)
    click.echo(printable(before) + part + printable(after), err=err, color=colour())


def say_json(told: Any) -> None:
    """Print one line of JSON in ASCII; every other character is escaped."""
    import json

    from ovm.wire import codec

    text = json.dumps(codec.builtins(told))
    print(text.replace("\x7f", "\\u007f"), flush=True)


def say_filled(template: str, row: Mapping[str, Any]) -> None:
    """Print the user's ``template`` with the values of ``row``, made printable.

    Raises:
        LookupError, ValueError, AttributeError, TypeError: the template is invalid or names no field.
    """
    print(template.format(**cleaned(row)), flush=True)


def cleaned(told: Any) -> Any:
    """Return the same values, with every text in them on one line and without control characters."""
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
    """Return click's ``color``: False if ``NO_COLOR`` is set, else None, which lets click choose."""
    return False if os.environ.get("NO_COLOR") else None
