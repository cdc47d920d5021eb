"""``ovm env``: print the variables that connect other programs to a machine, in a shell's syntax."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import click

from ovm.cli import json_option
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json


def _fish(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _powershell(value: str) -> str:
    for quote in "'\u2018\u2019\u201a\u201b":  # each of them ends a string
        value = value.replace(quote, quote * 2)
    return f"'{value}'"


_SET: dict[str, Callable[[str, str], str]] = {
    "sh": lambda name, value: f"export {name}={shlex.quote(value)}",
    "fish": lambda name, value: f"set -gx {name} {_fish(value)}",
    "powershell": lambda name, value: f"$Env:{name} = {_powershell(value)}",
}
_UNSET: dict[str, Callable[[str], str]] = {
    "sh": "unset {}".format,
    "fish": "set -e {}".format,
    "powershell": "Remove-Item -ErrorAction SilentlyContinue Env:{}".format,
}
_USE = {
    "sh": 'eval "$({})"',
    "fish": "{} | source",
    "powershell": "{} | Invoke-Expression",
}
"""How a shell evaluates the output."""
_DIALECTS = {"bash": "sh", "zsh": "sh", "sh": "sh", "fish": "fish", "powershell": "powershell", "pwsh": "powershell"}


def guess_shell() -> str:
    """Return the user's login shell, or ``sh`` for an unknown one."""
    name = Path(os.environ.get("SHELL", "")).name
    return name if name in _DIALECTS else "sh"


@click.command("env")
@name_argument
@click.option("--shell", type=click.Choice(list(_DIALECTS)), help="Shell syntax to print.  [default: by $SHELL]")
@click.option("--unset", is_flag=True, help="Unset the variables.")
@json_option
def command(name: str, *, shell: str | None, unset: bool, as_json: bool) -> None:
    """Print the variables that connect docker, podman and testcontainers to the machine NAME, running or not.

    In bash or zsh: eval "$(ovm env)"
    """
    from ovm.integrations.environment import variables
    from ovm.registry import machines

    wanted = variables(machines.find(name).sockets.podman)
    if as_json:
        say_json(dict.fromkeys(wanted) if unset else wanted)
        return
    dialect = _DIALECTS[shell or guess_shell()]
    for variable, value in wanted.items():
        print(_UNSET[dialect](variable) if unset else _SET[dialect](variable, value))
    if sys.stdout.isatty():
        typed = ["ovm", "env", *([] if name == "default" else [name])]
        typed += ["--unset"] * unset + (["--shell", shell] if shell else [])
        say("", "# to set them in this shell:", f"# {_USE[dialect].format(' '.join(typed))}", err=True)
