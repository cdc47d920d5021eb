"""The timing breakdown of a start: ``ovm start --timings`` and ``--timeline FILE``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ovm.cli import run
from ovm.cli.outlet import say

if TYPE_CHECKING:
    from ovm.model.info import Info
    from ovm.registry.machines import Machine

F = TypeVar("F")

UNITS_TIMEOUT_S = 30.0


class _Picture(click.ParamType[Path]):
    """A file in an existing directory, checked before the machine starts."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.is_dir() or not path.absolute().parent.is_dir():
            self.fail(f"{value} is a directory, or its parent directory does not exist", param, ctx)
        return path


def timings_options(command: F) -> F:
    """Add both options to a command, as ``timings`` and ``timeline``."""
    options: list[Callable[[Any], Any]] = [
        click.option("--timings", is_flag=True, help="Show the duration of each phase, on this host and in the guest."),
        click.option("--timeline", type=_Picture(), metavar="FILE", help="Write the same as an SVG picture to FILE."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Timings:
    """The requested forms of the breakdown."""

    as_table: bool = False
    picture: Path | None = None

    def show(self, machine: Machine, info: Info, *, with_units: bool) -> None:
        """Print the table to stderr and write the picture, optionally ``with_units`` of the guest's systemd."""
        if not self.as_table and self.picture is None:
            return
        from ovm.cli import timeline
        from ovm.trust.atomic import disk_errors, write_whole

        stages = info.timings
        found = timeline.phases(stages)
        told = run(_units(machine.name)) if with_units and timeline.kernel_began_ms(stages) is not None else ""
        units = timeline.units(told, stages)
        if self.as_table:
            say(*timeline.table([*found, *units]).split("\n"), err=True)
        if self.picture is not None:
            took_s = stages[-1].ms / 1000 if stages else 0
            title = f"{machine.name}: ready after {took_s:.1f} s ({info.hypervisor}, {info.accelerator})"
            with disk_errors(f"{self.picture} cannot be written"):
                write_whole(self.picture.absolute(), timeline.svg([*found, *units], title).encode(), 0o644)


async def _units(name: str) -> str:
    """Query the guest's systemd for its units; return an empty text if that fails."""
    import ovm
    from ovm.cli.timeline import SHOW_UNITS

    async with await ovm.connect(name) as machine:
        try:
            told = await machine.exec(SHOW_UNITS, timeout_s=UNITS_TIMEOUT_S)
        except ovm.OVMError:
            return ""
    return told.stdout.decode(errors="replace")
