"""SIGKILL at random moments of what people do with a machine: no data is lost, and nothing is half done."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import homes
import soak

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="the tiny image is one for QEMU"),
]

KILLS = 300
DATA = b"what people keep"
DATA_AT = 1 << 20
LOOK_S = 0.002
VICTIM_S = 60.0
"""Until a service is there to be killed."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """``victim`` dies ``share`` of the usual time behind the beginning of ``what``."""

    number: int
    what: str
    victim: str
    share: float


KINDS = (
    ("start", "service"),
    ("suspend", "service"),
    ("stop", "service"),
    ("rm", "command"),
    ("config", "command"),
    ("start", "command"),
    ("suspend", "command"),
    ("stop", "command"),
    ("rm", "command"),
    ("config", "command"),
)
"""What is done, and whether the machine's service or the command is killed; all in turn."""


class Scene:
    """A machine with data on its disk, and how long each thing usually takes."""

    def __init__(self, home: homes.Home) -> None:
        self.home = home
        self.usual_s: dict[str, float] = {}
        self.cpus = itertools.cycle((1, 2))

    @property
    def data_disk(self) -> Path:
        return self.home.machine("default") / "target" / "data.img"

    @property
    def service_pid(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads((self.home.machine("default") / "service.json").read_text())["pid"])
        return None

    def has_data(self) -> bool:
        with self.data_disk.open("rb") as file:
            file.seek(DATA_AT)
            return file.read(len(DATA)) == DATA

    async def prepare(self) -> None:
        """Measure a life without a kill."""
        self.home.init()
        await self.timed("start", "start")
        await self.timed("suspend", "suspend")
        await self.home.good("start")
        await self.timed("stop", "stop")
        await self.timed("config", "config", "set", "cpus", "1")
        self.home.init("doomed")
        await self.timed("rm", "rm", "-y", "doomed")
        with self.data_disk.open("r+b") as file:
            file.seek(DATA_AT)
            file.write(DATA)

    async def timed(self, what: str, *command: str) -> None:
        begun = time.monotonic()
        await self.home.good(*command)
        self.usual_s[what] = time.monotonic() - begun

    async def strike(self, kill: Kill, *command: str) -> homes.Done:
        """Run ``command`` and kill the victim at its time; how the command ended."""
        begun = time.monotonic()
        process = await self.home.begin(*command)
        telling = asyncio.create_task(process.communicate())
        pid = process.pid if kill.victim == "command" else await self.victim(begun)
        await asyncio.sleep(max(0.0, begun + kill.share * self.usual_s[kill.what] - time.monotonic()))
        if kill.victim != "command" or process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(homes.DEADLINE_S):
            out, err = await telling
        assert process.returncode is not None
        return homes.Done(process.returncode, out.decode(), err.decode())

    async def victim(self, begun: float) -> int:
        while (pid := self.service_pid) is None:
            assert time.monotonic() < begun + VICTIM_S, "no service came"
            await asyncio.sleep(LOOK_S)
        return pid


async def runs_again(scene: Scene, kill: Kill) -> None:
    """After the kill of a service nothing runs; after that of a command perhaps the service. Then all is as usual."""
    if kill.victim == "service":
        await scene.home.nothing_runs()
    assert scene.has_data()
    await scene.home.good("start")
    assert (await scene.home.status())["state"] == "VirtualMachineStateRunning"


async def start(scene: Scene, kill: Kill) -> None:
    await scene.home.good("stop")
    await scene.strike(kill, "start")
    await runs_again(scene, kill)


async def suspend(scene: Scene, kill: Kill) -> None:
    """Of the machine that the last kill has left running."""
    await scene.home.good("start")
    await scene.strike(kill, "suspend")
    await until_it_rests(scene)
    await runs_again(scene, kill)


async def stop(scene: Scene, kill: Kill) -> None:
    await scene.home.good("start")
    await scene.strike(kill, "stop")
    await until_it_rests(scene)
    await runs_again(scene, kill)


async def until_it_rests(scene: Scene) -> None:
    """A service whose command was killed may still be at what it was asked for, or was never asked."""
    await scene.home.run("stop")


async def rm(scene: Scene, kill: Kill) -> None:
    """Whole, or gone: its name can be used at once, and no settings of the old one appear under it."""
    name = f"doomed-{kill.number}"
    scene.home.init(name, hostname="before")
    data = scene.home.machine(name) / "target" / "data.img"
    data.parent.mkdir()
    data.write_bytes(DATA)
    await scene.strike(kill, "rm", "-y", name)
    if scene.home.machine(name).exists():
        assert data.read_bytes() == DATA
        assert "before" in (await scene.home.good("config", "get", "hostname", "--machine", name)).out
        await scene.home.good("rm", "-y", name)
    await scene.home.good("init", name)
    assert not data.exists()
    await scene.home.good("rm", "-y", name)


async def config(scene: Scene, kill: Kill) -> None:
    """The old settings or the new ones, whole; those that the command reported."""
    before = await settings(scene)
    cpus = str(next(scene.cpus))
    done = await scene.strike(kill, "config", "set", "cpus", cpus)
    now = await settings(scene)
    wanted = before | {"cpus": cpus}
    assert now in (before, wanted)
    if done.status == 0:
        assert now == wanted


async def settings(scene: Scene) -> dict[str, str]:
    return {key: (await scene.home.good("config", "get", key)).out.strip() for key in ("cpus", "memory", "disk")}


ACTIONS: dict[str, Callable[[Scene, Kill], Awaitable[None]]] = {
    "start": start,
    "suspend": suspend,
    "stop": stop,
    "rm": rm,
    "config": config,
}


async def test_what_is_killed_at_any_moment_loses_nothing(home: homes.Home) -> None:
    """The service, or the command, in the midst of start, suspend, stop, rm and config set."""
    scene = Scene(home)
    await scene.prepare()
    random = soak.random("kill what people do")
    count = soak.times(KILLS)
    kills = [
        Kill(number, *kind, random.uniform(0, 1.1))
        for number, kind in zip(range(count), itertools.cycle(KINDS), strict=False)
    ]
    failures = []
    for kill in kills:
        try:
            await ACTIONS[kill.what](scene, kill)
            assert scene.has_data()
        except Exception as error:  # noqa: BLE001 - the other rounds are worth as much
            failures.append(f"seed {soak.SEED}, {kill}: {error!r}")
            home.end()
            await home.nothing_runs()
    await home.run("stop")
    soak.row(
        f"{len(kills)} SIGKILLs of services and commands in start, suspend, stop, rm and config set",
        "0 lost, 0 half done",
        f"{len(failures)} failed",
    )
    assert not failures, "\n".join(failures)
    await home.nothing_left()
