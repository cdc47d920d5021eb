"""The NAME of a machine as an argument, which a shell can complete."""

from __future__ import annotations

from typing import Any, TypeVar

import click

F = TypeVar("F")


def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """The names that begin so."""
    from ovm.registry import machines

    return [name for name in machines.names() if name.startswith(incomplete)]


def name_argument(function: F) -> F:
    """Give a command the argument ``name``, ``default`` if it is not given."""
    add: Any = click.argument("name", default="default", shell_complete=complete)
    decorated: F = add(function)
    return decorated
