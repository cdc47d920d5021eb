"""Commands that take another command, word for word, behind ``--``."""

from __future__ import annotations

import click


class WithCommand(click.Command):
    """A command whose callback gets the words behind ``--`` as ``argv``; options among them are not its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:  # noqa: D102 - click's
        dashes = args.index("--") if "--" in args else len(args)
        ctx.allow_extra_args = True
        try:
            extra = super().parse_args(ctx, args[:dashes])
        except click.NoSuchOption as error:
            hint = "; one of a command for the guest goes with it behind --"
            raise click.UsageError(error.format_message().rstrip(".") + hint, ctx) from error
        if extra and not ctx.resilient_parsing:
            there = f"{ctx.command_path} {ctx.params['name']} -- {' '.join(extra)}"
            ctx.fail(f"a command for the guest goes behind --: {there}")
        ctx.params["argv"] = args[dashes + 1 :]
        return extra

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:  # noqa: D102 - click's
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND ...]"]
