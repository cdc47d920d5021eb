"""``ovm logs``."""

from __future__ import annotations

import time

import click

from ovm.cli.names import name_argument
from ovm.cli.outlet import say

AGAIN_S = 0.25
"""Poll interval of a followed log."""


@click.command("logs")
@name_argument
@click.argument("log", default="console")
@click.option("-f", "--follow", is_flag=True, help="Print new lines until Ctrl-C.")
@click.option(
    "-n", "--lines", type=click.IntRange(1), default=100, show_default=True, help="Number of lines to begin with."
)
@click.option(
    "--generation", type=click.IntRange(1, 3), default=1, help="Start to show: 1 is the last, 2 and 3 those before."
)
@click.option("--ls", "only_names", is_flag=True, help="List the machine's logs.")
def command(name: str, log: str, *, follow: bool, lines: int, generation: int, only_names: bool) -> None:
    """Show the end of a log of the machine NAME.

    LOG is console (the guest's, and the default), service, gvproxy, qemu, vfkit or guard.
    """
    from ovm.errors import FileError
    from ovm.process import logs
    from ovm.registry import machines

    machine = machines.find(name)
    there = sorted({path.name.partition(".")[0] for path in machine.log_dir.glob("*.log")})
    if only_names:
        say(*there)
        return
    path = logs.log_path(machine.log_dir, log, generation)
    if log not in there or not path.exists():
        raise FileError(
            f"{name} has no log {log!r}" + (f" of {generation} starts ago" if generation > 1 else ""),
            hint=f"choose one of {', '.join(there)}" if there else f"start it for the first time: ovm start {name}",
        )
    with logs.Reader(path, lines) as reader:
        while (more := reader.more()) or follow:
            _show(more)
            if not more:
                time.sleep(AGAIN_S)
        _show(reader.rest())


def _show(lines: list[str]) -> None:
    for line in lines:
        say(line)
