"""Commands that take another command unchanged after ``--``."""

from __future__ import annotations

import click


class WithCommand(click.Command):
    """A command whose callback gets the arguments after ``--`` as ``argv``; it does not parse options in them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:  # noqa: D102 - click's
        dashes = args.index("--") if "--" in args else len(args)
        ctx.allow_extra_args = True
        try:
            extra = super().parse_args(ctx, args[:dashes])
        except click.NoSuchOption as error:
            hint = "; put a guest command and its options after --"
            raise click.UsageError(error.format_message().rstrip(".") + hint, ctx) from error
        if extra and not ctx.resilient_parsing:
            there = f"{ctx.command_path} {ctx.params['name']} -- {' '.join(extra)}"
            ctx.fail(f"put the guest command after --: {there}")
        ctx.params["argv"] = args[dashes + 1 :]
        return extra

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:  # noqa: D102 - click's
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND ...]"]
