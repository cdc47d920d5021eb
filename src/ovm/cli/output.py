"""Tables, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import click

from ovm.cli.outlet import say, say_filled, say_json
from ovm.text.printable import printable

F = TypeVar("F")


def format_option(function: F) -> F:
    """Add ``--format``, the template of a line for the result or for each row, to a command."""
    said = "Template of each line, such as '{name} {state}', with the fields of --json."
    add: Any = click.option("--format", "template", metavar="TEMPLATE", help=said)
    decorated: F = add(function)
    return decorated


def filled(row: Mapping[str, Any], template: str) -> None:
    """Print ``row`` as one line by ``template``."""
    try:
        say_filled(template, row)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        fields = ", ".join(row)
        raise click.BadParameter(f"{template!r} is not a valid template; the fields are {fields}") from error


def rows(
    found: Sequence[Mapping[str, Any]], columns: Sequence[str], *, as_json: bool = False, template: str | None = None
) -> None:
    """Print ``found`` as a table of ``columns``, as JSON, or each row by ``template``."""
    if as_json:
        say_json(list(found))
        return
    if template is not None:
        for row in found:
            filled(row, template)
        return
    cells = [[column.replace("_", " ").upper() for column in columns]]
    cells += [["" if row[column] is None else printable(str(row[column])) for column in columns] for row in found]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    for line in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
