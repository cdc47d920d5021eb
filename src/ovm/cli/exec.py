"""``ovm exec``: one program in the guest, its words and its exit status kept."""

from __future__ import annotations

import shlex

import click

from ovm.cli.names import name_argument
from ovm.cli.openssh import become, ssh_program
from ovm.cli.passthrough import WithCommand


@click.command("exec", cls=WithCommand)
@name_argument
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal; for programs that draw or ask.")
@click.pass_context
def command(ctx: click.Context, /, name: str, *, tty: bool, argv: list[str]) -> None:
    """Run COMMAND in the running machine NAME, as root, and end with its status.

    Its words reach it as they are here: no shell in the guest looks at them.
    """
    from ovm.integrations import ssh_config

    if not argv:
        ctx.fail(f"missing command; put it after --: {ctx.command_path} -- uname -a")
    # ssh has no status for a program that a signal has ended, the guest's shell has: 128 and the signal's number
    line = f"{shlex.join(argv)}; exit $?"
    become([*ssh_program("ssh", name), "-t" if tty else "-T", "--", ssh_config.host(name), line])
