"""The command ``ovm``.

Each verb has its own module, imported only when that verb runs: ``ovm --help`` imports click and nothing else.
Only this module turns errors into messages and exit statuses.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NoReturn, TypeVar

import click

from ovm._version import __version__
from ovm.cli.outlet import say, say_json, say_styled
from ovm.errors import OVMError

ProgressMode = Literal["auto", "plain", "none"]

EXIT_FAILED = 1
EXIT_NOT_SO = 3
"""Exit status of ``ovm status`` if the machine does not run, of ``ovm autostart status`` if autostart is off."""
EXIT_INTERRUPTED = 130
SIGNAL_STATUS = 128
"""Added to the number of the signal that ended a program, as shells do."""

_VERBS = {
    "start": ("ovm.cli.start:command", "Start a machine and print how to reach its container engine."),
    "init": ("ovm.cli.init:command", "Create a machine without starting it."),
    "ls": ("ovm.cli.ls:command", "List the machines of this host."),
    "rm": ("ovm.cli.rm:command", "Remove machines and all their data."),
    "config": ("ovm.cli.config:command", "Show and change a machine's settings."),
    "autostart": ("ovm.cli.autostart:command", "Start machines when you log in."),
    "stop": ("ovm.cli.stop:command", "Shut a machine down."),
    "suspend": ("ovm.cli.suspend:command", "Save a machine's state to disk; its next start resumes it."),
    "restart": ("ovm.cli.restart:command", "Shut a machine down and start it again."),
    "status": ("ovm.cli.status:command", "Show a machine's state."),
    "info": ("ovm.cli.info:command", "Show a running machine's addresses and resources."),
    "ssh": ("ovm.cli.ssh:command", "Open a shell in a running machine."),
    "exec": ("ovm.cli.exec:command", "Run a program in a running machine."),
    "cp": ("ovm.cli.cp:command", "Copy files to and from a running machine."),
    "env": ("ovm.cli.env:command", "Print the environment variables that connect docker and podman to a machine."),
    "port": ("ovm.cli.port:command", "Forward ports of this host to a machine."),
    "logs": ("ovm.cli.logs:command", "Show a log of a machine."),
    "events": ("ovm.cli.events:command", "Show the events of a running machine."),
    "pause": ("ovm.cli.pause:command", "Pause a machine."),
    "resume": ("ovm.cli.resume:command", "Resume a paused machine."),
    "clocksync": ("ovm.cli.clocksync:command", "Set a machine's clock from this host's."),
    "reset": ("ovm.cli.reset:command", "Restore the files that a machine boots from."),
    "prune": (
        "ovm.cli.prune:command",
        "Remove unused containers and images, and return their disk space to this host.",
    ),
    "doctor": ("ovm.cli.doctor:command", "Check this host for everything that ovm needs."),
    "image": ("ovm.cli.image:command", "Build, fetch and manage guest images."),
    "support-bundle": ("ovm.cli.support_bundle:command", "Collect diagnostics for a bug report."),
    "completion": ("ovm.cli.completion:command", "Print a shell's completion script."),
}
"""Each verb's command, as MODULE:ATTRIBUTE, and its line in the help."""

_T = TypeVar("_T")


@dataclass(slots=True)
class Ui:
    """Output options of this run, given before or after the verb."""

    progress: ProgressMode = "auto"
    json: bool = False


class Verbs(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002, D102 - click's
        return list(_VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002, D102 - click's
        if name not in _VERBS:
            return None
        module, _, attribute = _VERBS[name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(  # noqa: D102 - click's
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _VERBS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], _VERBS, 1)
            ctx.fail(f"there is no command {args[0]!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002, D102 - click's
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _VERBS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:  # noqa: D102 - click's
        from click.shell_completion import CompletionItem

        verbs = [CompletionItem(name, help=line) for name, (_, line) in _VERBS.items() if name.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ovm", message="%(prog)s %(version)s")
@click.option(
    "--progress",
    type=click.Choice(["auto", "plain", "none"]),
    default="auto",
    help="How to show progress: auto draws on a terminal and is plain elsewhere.",
)
@click.pass_obj
def ovm(ui: Ui, progress: ProgressMode) -> None:
    """Run and manage small Linux virtual machines with Podman."""
    ui.progress = progress


def json_option(function: Any) -> Any:
    """Add ``--json`` to a command, which prints its result or error as one line of JSON on stdout."""

    def remember(ctx: click.Context, _param: click.Parameter, chosen: bool) -> bool:
        ctx.ensure_object(Ui).json = chosen
        return chosen

    # eager: an error in another option is then reported as JSON
    return click.option(
        "--json", "as_json", is_flag=True, is_eager=True, callback=remember, help="Print JSON for programs."
    )(function)


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run the asynchronous part of a command."""
    import asyncio

    from ovm.service import journal

    journal.begin_command()
    return asyncio.run(coroutine)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run ``ovm`` and exit with its status."""
    ui = Ui()
    try:
        status = _status(ui, args)
        sys.stdout.flush()
    except BrokenPipeError:
        # otherwise the interpreter reports the broken pipe when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_FAILED
    sys.exit(status)


def _status(ui: Ui, args: Sequence[str] | None) -> int:
    try:
        result = ovm.main(args, prog_name="ovm", obj=ui, standalone_mode=False)
    except click.ClickException as error:
        if ui.json or "--json" in (sys.argv[1:] if args is None else args):  # parsing may have failed before it
            say_json({"error": {"code": "usage", "message": error.format_message()}})
        else:
            shown = io.StringIO()
            error.show(shown)
            say(*shown.getvalue().splitlines(), err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("ovm: interrupted", err=True)
        return EXIT_INTERRUPTED
    except OVMError as error:
        _report(ui, error.as_dict(), str(error))
        return EXIT_FAILED
    except OSError as error:
        _report(ui, {"code": "os", "message": str(error)}, _os_error(error))
        return EXIT_FAILED
    except Exception as error:
        if os.environ.get("OVM_DEBUG"):
            raise
        text = f"{type(error).__name__}: {error}"
        hint = "report this as a bug in ovm, with the traceback that OVM_DEBUG=1 in the environment shows"
        _report(ui, {"code": "internal", "message": text, "hint": hint}, f"{text}\n  hint: {hint}")
        return EXIT_FAILED
    return result if isinstance(result, int) else 0


def _os_error(error: OSError) -> str:
    from pathlib import Path

    from ovm.text.printable import printable
    from ovm.trust.files import advice

    if not isinstance(error.filename, str | bytes) or not error.strerror:
        return printable(str(error))
    path = os.fsdecode(error.filename)
    hint = advice(error, Path(path))
    return printable(f"{path}: {error.strerror}") + (f"\n  hint: {printable(hint)}" if hint else "")


def _report(ui: Ui, for_programs: dict[str, object], for_people: str) -> None:
    if ui.json:
        say_json({"error": for_programs})
    else:
        first, *others = for_people.split("\n")
        say_styled("", "ovm: ", first, err=True, fg="red", bold=True)
        say(*others, err=True)
