"""What a machine's service costs while nobody asks for anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from bench import programs
from bench.samples import SpoiledError, timed
from bench.setting import BOOT_DEADLINE_S, CPUS, MEMORY_MIB, Bench, NotHereError

ROWS = ("idle service: CPU", "idle service: memory")
MACHINE = "idle"
BOOT = "boot of the idle service's machine"
"""It is no row, and told of only if it had to be made again."""
SETTLE_SHARE = 0.25
"""How much of the time that is measured passes before: what a start leaves to do is done by then."""


async def measure(bench: Bench) -> None:
    """Of a service that was started as people do, over a stretch of time."""
    bench.tell("starting a service")
    async with _service(bench) as pid:
        bench.tell("watching it do nothing")
        await asyncio.sleep(bench.scale.idle_s * SETTLE_SHARE)
        begun, used = time.monotonic(), _cpu_s(pid)
        await asyncio.sleep(bench.scale.idle_s)
        share = (_cpu_s(pid) - used) / (time.monotonic() - begun)
        bench.recorder.add("idle service: CPU", share * 100, "%")
        bench.recorder.add("idle service: memory", _resident_mib(pid), "MiB")


@contextlib.asynccontextmanager
async def _service(bench: Bench) -> AsyncIterator[int]:
    """The process that is one; stopped on the way out."""
    home, run = bench.work / "service", bench.work / "run"
    machine = home / "machines" / MACHINE
    machine.mkdir(parents=True)
    run.mkdir(mode=0o700)
    settings = f"image = {json.dumps(os.fspath(bench.image))}\ncpus = {CPUS}\nmemory = {MEMORY_MIB}\n"
    (machine / "machine.toml").write_text(settings, "utf-8")
    environment = os.environ | {
        "OVM_HOME": os.fspath(home),
        "XDG_RUNTIME_DIR": os.fspath(run),
        "PATH": os.pathsep.join([os.fspath(bench.gvproxy.path.parent), programs.search_path()]),
    }
    ovm = programs.own("ovm")

    async def boot() -> float:
        starting = programs.run([ovm, "start", MACHINE], environment=environment, deadline_s=BOOT_DEADLINE_S)
        try:
            return await timed(starting)
        except programs.ProgramError as error:
            await programs.run([ovm, "stop", MACHINE], environment=environment)  # it may still be booting
            raise SpoiledError(str(error)) from error

    try:
        if await bench.recorder.unspoiled(BOOT, boot) is None:
            raise NotHereError("the machine did not come up")
        yield json.loads((machine / "service.json").read_bytes())["pid"]
    finally:
        await programs.run([ovm, "stop", MACHINE], environment=environment)


def _cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mib(pid: int) -> float:
    """How much memory it has in use."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024
