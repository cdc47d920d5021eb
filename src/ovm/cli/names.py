"""The argument NAME of a machine, with shell completion."""

from __future__ import annotations

from typing import Any, TypeVar

import click

F = TypeVar("F")


def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of machines that begin with ``incomplete``."""
    from ovm.registry import machines

    return [name for name in machines.names() if name.startswith(incomplete)]


def name_argument(function: F) -> F:
    """Add the argument ``name``, by default ``default``, to a command."""
    add: Any = click.argument("name", default="default", shell_complete=complete)
    decorated: F = add(function)
    return decorated
