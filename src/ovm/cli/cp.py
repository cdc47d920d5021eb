"""``ovm cp``: copy files and directories between this host and a guest, with OpenSSH's scp."""

from __future__ import annotations

import re
import sys

import click

from ovm.cli import Ui
from ovm.cli.openssh import become, ssh_program

_IN_GUEST = re.compile(r"([^/:]+):(.*)", re.DOTALL)
_PATTERN = re.compile(r"[\\*?\[\]]")


@click.command("cp")
@click.argument("source", type=click.Path(path_type=str))
@click.argument("destination", type=click.Path(path_type=str))
@click.pass_obj
def command(ui: Ui, /, source: str, destination: str) -> None:
    """Copy SOURCE to DESTINATION. One of them is NAME:PATH, a path in the running machine NAME.

    Directories are copied recursively. A relative PATH is relative to root's home. Write a file of this host with a
    colon in its name as ./a:b.
    """
    from ovm.integrations import ssh_config

    match _IN_GUEST.fullmatch(source), _IN_GUEST.fullmatch(destination):
        case re.Match() as found, None:
            name, path = found.groups()
            path = _PATTERN.sub(r"\\\g<0>", path)  # scp expands patterns when it reads, not when it writes
            paths = [f"{ssh_config.host(name)}:{path}", _here(destination)]
        case None, re.Match() as found:
            name, path = found.groups()
            paths = [_here(source), f"{ssh_config.host(name)}:{path}"]
        case _:
            raise click.UsageError("give exactly one of SOURCE and DESTINATION as NAME:PATH, a path in a machine")
    quiet = [] if ui.progress == "auto" and sys.stdout.isatty() else ["-q"]
    become([*ssh_program("scp", name), "-s", "-r", *quiet, "--", *paths])


def _here(path: str) -> str:
    """Return ``path`` in a form that scp always reads as a path of this host."""
    return path if path.startswith("/") else f"./{path}"
