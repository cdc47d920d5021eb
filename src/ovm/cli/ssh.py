"""``ovm ssh``: run OpenSSH's ssh with the guest's address and host key."""

from __future__ import annotations

import sys

import click

from ovm.cli.names import name_argument
from ovm.cli.openssh import become, ssh_program
from ovm.cli.outlet import say
from ovm.cli.passthrough import WithCommand


@click.command("ssh", cls=WithCommand)
@name_argument
@click.option("--config", is_flag=True, help="Print a line for ~/.ssh/config that enables `ssh ovm-NAME`.")
def command(name: str, *, config: bool, argv: list[str]) -> None:
    """Open a shell in the running machine NAME, or run COMMAND in its shell."""
    from ovm.integrations import ssh_config

    if config:
        say(*ssh_config.include().split("\n"))
        if sys.stdout.isatty():
            say("", "# put this at the top of ~/.ssh/config, before the first Host", err=True)
        return
    become([*ssh_program("ssh", name), "--", ssh_config.host(name), *argv])
