"""Starts: cold beside the opponents', and warm."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from functools import partial

import ovm
from bench import opponents
from bench.samples import Measure, SpoiledError, alternate, timed
from bench.setting import BOOT_DEADLINE_S, CPUS, MEMORY_MIB, Bench, NotHereError
from ovm.errors import GuestError, StartError, UnsupportedError

COLD_ROWS = ("cold start: ovm", "cold start: bare", "cold start: stock", "stop", "guest memory at ready")
WARM_ROWS = ("suspend", "warm start")
RUNNING = "boot of the running machine"
"""It is no row, and told of only if it had to be made again."""


async def create(bench: Bench) -> ovm.OVM:
    """The machine that is measured, with directories of its own."""
    home = bench.work / "machine"
    return await ovm.create_ovm(
        "bench",
        image=bench.image,
        cpus=CPUS,
        memory_mib=MEMORY_MIB,
        target_dir=home / "target",
        log_dir=home / "log",
        ssh_key_dir=home / "ssh",
        socket_dir=home / "socket",
    )


async def cold(bench: Bench, machine: ovm.OVM) -> None:
    """Of all sides by turns. The first start formats the data disk, so it is one that warms up."""
    sides: dict[str, Measure] = {
        "cold start: ovm": partial(_start, bench, machine),
        "cold start: bare": partial(opponents.boot_bare, bench),
    }
    if bench.scale.stock:
        try:
            sides["cold start: stock"] = partial(opponents.boot_stock, bench, await opponents.stock(bench))
        except NotHereError as error:
            bench.missing["cold start: stock"] = str(error)
    else:
        bench.missing["cold start: stock"] = "it takes minutes to build, and this is a smoke run"
    bench.tell("cold starts")
    await alternate(sides, bench.recorder, runs=bench.scale.runs, warm_ups=bench.scale.warm_ups)


async def boot(machine: ovm.OVM) -> float:
    """Start it; the milliseconds it took.

    Raises:
        SpoiledError: it did not come up, or not before ovm had begun anew; it is stopped.
    """
    stages: list[str] = []
    try:
        ms = await timed(machine.start(timeout_s=BOOT_DEADLINE_S, progress=stages.append))
    except (StartError, GuestError) as error:
        raise SpoiledError(error.message) from error
    if stages.count(stages[0]) > 1:
        await machine.stop()
        raise SpoiledError("the guest's kernel crashed before its first message, and was started again")
    return ms


@contextlib.asynccontextmanager
async def running(bench: Bench, machine: ovm.OVM) -> AsyncIterator[None]:
    """``machine``, booted; stopped on the way out.

    Raises:
        NotHereError: its boot was given up.
    """
    if await bench.recorder.unspoiled(RUNNING, partial(boot, machine)) is None:
        raise NotHereError("the machine did not come up")
    try:
        yield
    finally:
        await machine.stop()


async def _start(bench: Bench, machine: ovm.OVM) -> float:
    ms = await boot(machine)
    try:
        memory = await _memory_in_use(machine)
    except GuestError as error:
        raise SpoiledError(error.message) from error
    finally:
        stopped = await timed(machine.stop())
    bench.recorder.add("guest memory at ready", memory, "MiB")
    bench.recorder.add("stop", stopped)
    return ms


async def _memory_in_use(machine: ovm.OVM) -> float:
    text = (await machine.exec(["cat", "/proc/meminfo"])).text
    kib = {name: int(value) for name, value in re.findall(r"(\w+): +(\d+) kB", text)}
    return (kib["MemTotal"] - kib["MemAvailable"]) / 1024


async def warm(bench: Bench, machine: ovm.OVM) -> None:
    """Suspend the running ``machine`` and start it again, until it has gone on each time.

    Raises:
        NotHereError: this ovm, or this machine, cannot be suspended; or a start did not go on from the memory.
    """
    suspend = getattr(machine, "suspend", None)
    if suspend is None:
        raise NotHereError("not supported: this ovm cannot suspend a machine")
    bench.tell("warm starts")
    boot = await _boot_id(machine)
    for run in range(-bench.scale.warm_ups, bench.scale.runs):
        try:
            suspended = await timed(suspend())
        except UnsupportedError as error:
            raise NotHereError(f"not supported: {error.message}") from error
        started = await timed(machine.start())
        if await _boot_id(machine) != boot:
            raise NotHereError(f"the guest was booted instead: {getattr(machine.info, 'not_resumed', '')}")
        if run >= 0:
            bench.recorder.add("suspend", suspended)
            bench.recorder.add("warm start", started)


async def _boot_id(machine: ovm.OVM) -> str:
    return (await machine.exec(["cat", "/proc/sys/kernel/random/boot_id"])).text
