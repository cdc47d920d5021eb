"""The plugin for pytest, in runs of their own: one machine for all of them, stopped by the last."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from pathlib import Path
from typing import Any

import pytest

import homes

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(sys.platform != "linux", reason="the tiny image is one for QEMU"),
]

TESTS = """
import json, os, pathlib, time
import pytest

HERE = pathlib.Path(__file__).parent

@pytest.mark.parametrize("number", range(4))
def test_machine(ovm_machine, ovm_docker_host, number):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    seen = {"pid": ovm_machine.status().pid, "worker": worker, "host": os.environ["DOCKER_HOST"]}
    assert ovm_docker_host == os.environ["CONTAINER_HOST"]
    (HERE / f"{ovm_machine.name}.{worker}.{number}.seen").write_text(json.dumps(seen))
    while (HERE / "wait").exists():
        time.sleep(0.05)
"""


class Runs:
    """Runs of pytest, each in a directory of its own, that use machines of one home."""

    def __init__(self, home: homes.Home) -> None:
        self.home = home

    def directory(self, name: str) -> Path:
        made = self.home.root / name
        made.mkdir()
        (made / "test_it.py").write_text(TESTS)
        return made

    async def begin(self, directory: Path, *args: str) -> asyncio.subprocess.Process:
        argv = [sys.executable, "-m", "pytest", "-q", "-W", "error", "--rootdir", directory, "-c", os.devnull, *args]
        argv += ["-p", "no:cacheprovider", "-p", "no:schemathesis", "-p", "no:asyncio"]
        return await asyncio.create_subprocess_exec(
            *argv, cwd=directory, env=self.home.environment, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT
        )

    async def run(self, directory: Path, *args: str) -> str:
        return await self.end(await self.begin(directory, *args))

    async def end(self, process: asyncio.subprocess.Process) -> str:
        async with asyncio.timeout(homes.DEADLINE_S):
            out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
        return out.decode()

    async def until_seen(self, directory: Path) -> None:
        async with asyncio.timeout(homes.DEADLINE_S):
            while not self.seen(directory):
                await asyncio.sleep(0.05)

    def seen(self, directory: Path) -> dict[str, Any]:
        """What tests have seen, by machine, worker and number."""
        return {path.stem: json.loads(path.read_text()) for path in directory.glob("*.seen") if path.stat().st_size}

    def pids(self, directory: Path) -> set[int]:
        return {told["pid"] for told in self.seen(directory).values()}


@pytest.fixture
def runs(home: homes.Home) -> Runs:
    return Runs(home)


async def test_workers_share_one_machine(home: homes.Home, runs: Runs) -> None:
    """Which is there for all of them, and gone when all are done."""
    home.init("pytest")
    directory = runs.directory("a")
    out = await runs.run(directory, "-n", "2", "--dist", "each")
    assert "8 passed" in out
    assert {told["worker"] for told in runs.seen(directory).values()} == {"gw0", "gw1"}
    assert len(runs.pids(directory)) == 1
    assert (await home.status("pytest"))["why"] == "stopped"
    await home.nothing_left()


async def test_two_runs_side_by_side(home: homes.Home, runs: Runs) -> None:
    """The first to end leaves it to the other."""
    home.init("mine")
    slow, quick = runs.directory("slow"), runs.directory("quick")
    (slow / "wait").touch()
    other = await runs.begin(slow, "--ovm-machine", "mine")
    await runs.until_seen(slow)
    await runs.run(quick, "--ovm-machine", "mine")
    assert (await home.status("mine"))["state"] == "VirtualMachineStateRunning"
    (slow / "wait").unlink()
    await runs.end(other)
    assert runs.pids(slow) == runs.pids(quick)
    assert (await home.status("mine"))["why"] == "stopped"
    await home.nothing_left()


async def test_a_run_that_was_killed(home: homes.Home, runs: Runs) -> None:
    """Its machine goes on, for nobody is there to stop it; the next run uses it and does."""
    home.init("pytest")
    killed, following = runs.directory("killed"), runs.directory("following")
    (killed / "wait").touch()
    other = await runs.begin(killed)
    await runs.until_seen(killed)
    other.kill()
    await other.wait()
    assert (await home.status("pytest"))["state"] == "VirtualMachineStateRunning"
    await runs.run(following)
    assert runs.pids(killed) == runs.pids(following)
    assert (await home.status("pytest"))["why"] == "stopped"
    await home.nothing_left()


async def test_a_machine_of_a_worker_that_is_kept(home: homes.Home, runs: Runs) -> None:
    """It has the settings of the named one; kept, it is a person's, and later runs do not stop it."""
    home.init("pytest", memory=300)
    directory, later = runs.directory("a"), runs.directory("later")
    await runs.run(directory, "-n", "1", "--ovm-per-worker", "--ovm-keep")
    assert (await home.good("info", "pytest-gw0", "--json")).json["memory_mib"] == 300
    assert (await home.status("pytest"))["state"] == "VirtualMachineStateStopped"
    await runs.run(later, "-n", "1", "--ovm-per-worker")
    assert runs.pids(directory) == runs.pids(later) == {(await home.status("pytest-gw0"))["pid"]}
    await home.good("stop", "--force", "pytest-gw0")
    await home.nothing_left()


async def test_an_interrupted_run_stops_what_it_has_begun_to_start(home: homes.Home, runs: Runs) -> None:
    """Ctrl-C in a run of pytest stops a machine that is being started."""
    home.init("pytest", "never")
    run = await runs.begin(runs.directory("a"))
    console = home.machine("pytest") / "log" / "console.log"
    async with asyncio.timeout(homes.DEADLINE_S):
        while not console.exists() or "tiny: booted" not in console.read_text(errors="replace"):
            await asyncio.sleep(0.05)
    run.send_signal(signal.SIGINT)
    out, _ = await run.communicate()
    assert b"KeyboardInterrupt" in out
    await home.nothing_left()


async def test_a_machine_that_does_not_start_is_told_in_words(home: homes.Home, runs: Runs) -> None:
    """A machine that does not start is reported by its error and hint."""
    home.init("pytest", "fatal=data-unformatted")
    run = await runs.begin(runs.directory("a"))
    out, _ = await run.communicate()
    assert run.returncode == 1
    assert b"the machine pytest for the tests: " in out
    assert b"tiny cannot go on" in out
    assert b"Traceback" not in out
    assert b"sharing.py" not in out
    await home.nothing_left()
