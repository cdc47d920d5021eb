"""``ovm completion``."""

from __future__ import annotations

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print a shell's completion script.

    \b
    bash:  eval "$(ovm completion bash)"                       in ~/.bashrc
    zsh:   eval "$(ovm completion zsh)"                        in ~/.zshrc
    fish:  ovm completion fish > ~/.config/fish/completions/ovm.fish
    """  # noqa: D301 - \b keeps click from refilling the lines
    from click.shell_completion import get_completion_class

    from ovm.cli import ovm

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ovm, {}, "ovm", "_OVM_COMPLETE").source())
