"""``ovm exec``: run a program in the guest with exactly its arguments, and exit with its status."""

from __future__ import annotations

import shlex

import click

from ovm.cli.names import name_argument
from ovm.cli.openssh import become, ssh_program
from ovm.cli.passthrough import WithCommand


@click.command("exec", cls=WithCommand)
@name_argument
@click.option("-t", "--tty", is_flag=True, help="Allocate a terminal, for interactive programs.")
@click.pass_context
def command(ctx: click.Context, /, name: str, *, tty: bool, argv: list[str]) -> None:
    """Run COMMAND as root in the running machine NAME, and exit with its status.

    No shell in the guest expands its arguments.
    """
    from ovm.integrations import ssh_config

    if not argv:
        ctx.fail(f"missing command; put it after --: {ctx.command_path} -- uname -a")
    # ssh has no exit status for a program that a signal ended; the guest's shell has: 128 plus the signal's number
    line = f"{shlex.join(argv)}; exit $?"
    become([*ssh_program("ssh", name), "-t" if tty else "-T", "--", ssh_config.host(name), line])
