"""``ovm ssh``: OpenSSH's own ssh, told where the guest is and which host key it must have."""

from __future__ import annotations

import sys

import click

from ovm.cli.names import name_argument
from ovm.cli.openssh import become, ssh_program
from ovm.cli.outlet import say
from ovm.cli.passthrough import WithCommand


@click.command("ssh", cls=WithCommand)
@name_argument
@click.option("--config", is_flag=True, help="Print the line for ~/.ssh/config that makes `ssh ovm-NAME` work.")
def command(name: str, *, config: bool, argv: list[str]) -> None:
    """Open a shell in the running machine NAME, or have its shell do COMMAND."""
    from ovm.integrations import ssh_config

    if config:
        say(*ssh_config.include().split("\n"))
        if sys.stdout.isatty():
            say("", "# for the top of ~/.ssh/config, before the first Host", err=True)
        return
    become([*ssh_program("ssh", name), "--", ssh_config.host(name), *argv])
