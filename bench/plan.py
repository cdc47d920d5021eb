"""What is measured, in what order, and in what time."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench import commands, disks, host, idle, running, starts
from bench.programs import ProgramError
from bench.result import FORMAT, Result
from bench.setting import Bench, NotHereError, Scale
from ovm import hypervisors, paths
from ovm.errors import OVMError
from ovm.host import programs
from ovm.hypervisors import accel
from ovm.registry import images as registry

BUDGET_S = 20 * 60.0
"""For all of it, what is made once and kept included."""
STOP_DEADLINE_S = 60.0
"""Of the budget, kept for ending what is under way when it is over."""
SCRATCH = Path("/var/tmp")  # noqa: S108 - on a disk, where /tmp may be memory; and short, for sockets


@dataclass(frozen=True, slots=True)
class Group:
    """Things that are measured together."""

    name: str
    measure: Callable[[Bench], Awaitable[None]]
    rows: tuple[str, ...]


async def _cold(bench: Bench) -> None:
    await starts.cold(bench, await starts.create(bench))


async def _running(bench: Bench) -> None:
    machine = await starts.create(bench)
    async with starts.running(bench, machine):
        await running.measure(bench, machine)
        try:
            await starts.warm(bench, machine)
        except NotHereError as error:
            bench.missing.update(dict.fromkeys(starts.WARM_ROWS, str(error)))


GROUPS = (
    Group("commands", commands.measure, commands.ROWS),
    Group("disks", disks.measure, disks.ROWS),
    Group("cold starts", _cold, starts.COLD_ROWS),
    Group("a running machine", _running, running.ROWS + starts.WARM_ROWS),
    Group("an idle service", idle.measure, idle.ROWS),
)
ROWS = frozenset(row for group in GROUPS for row in group.rows)


async def carry_out(image: Path, cache: Path, scale: Scale, tell: Callable[[str], None], *, smoke: bool) -> Result:
    """Measure everything that can be measured here; leaves nothing behind but the cache.

    Raises:
        OVMError: there is no image, no gvproxy or no QEMU.
    """
    began, clock = datetime.now(UTC), time.monotonic()
    with _scratch(cache) as work:
        qemu = await programs.find_qemu(registry.host_arch())
        bench = Bench(
            scale=scale,
            image=image,
            gvproxy=await programs.find_gvproxy(),
            qemu=qemu,
            accelerator=await _accelerator(qemu, image),
            cache=cache,
            work=work,
            tell=tell,
        )
        described, before = host.describe(bench), await host.noise()
        for group in GROUPS:
            await _measure(group, bench, clock + BUDGET_S - STOP_DEADLINE_S)
        after = await host.noise()
    measured = bench.recorder.rows()
    return Result(
        format=FORMAT,
        at=began.isoformat(timespec="seconds"),
        took_s=time.monotonic() - clock,
        runs=scale.runs,
        smoke=smoke,
        host=described,
        before=before,
        after=after,
        rows={row: measured[row] for group in GROUPS for row in group.rows if row in measured},
        missing=bench.missing,
        spoiled={row: whys for row, whys in bench.recorder.spoiled.items() if whys},
    )


@contextlib.contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """A directory for this run, and the one for all."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ovm-bench-", dir=SCRATCH) as work:
        Path(work).chmod(0o711)  # an ordinary user's program runs in it
        yield Path(work)


async def _accelerator(qemu: programs.Helper, image: Path) -> str:
    """The one that ovm chooses, for the opponents to have the same."""
    emulator = accel.Emulator(program=qemu.path, version=qemu.version, arch=hypervisors.host_arch())
    kernel = registry.load_image(image).path("kernel")
    return (await accel.choose("auto", emulator, kernel=kernel, cache_dir=paths.cache_dir())).accelerator


async def _measure(group: Group, bench: Bench, until: float) -> None:
    """One group; what goes wrong in it is told, and the others are measured all the same."""
    try:
        async with asyncio.timeout(until - time.monotonic()):
            await group.measure(bench)
    except TimeoutError:
        bench.missing[group.name] = f"the {BUDGET_S / 60:.0f} minutes were over"
    except NotHereError as error:
        bench.missing[group.name] = str(error)
    except (OVMError, ProgramError, OSError) as error:
        bench.missing[group.name] = f"it failed: {error}"
