"""Manager and guard are killed at the same instant: nobody ends the helpers, until somebody wants the machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import ovm
import tiny
import under
import watched
from ovm.paths import LOCK, SocketPaths
from ovm.process import identity

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(sys.platform != "linux", reason="it watches processes by pidfds"),
]

MANAGER = Path(__file__).parents[1] / "e2e" / "manager.py"
DEADLINE_S = 120.0


@contextlib.asynccontextmanager
async def manager(machines: tiny.Machines) -> AsyncIterator[Process]:
    """Another process, which makes the machine and starts it."""
    options = json.dumps(machines.options())
    process = await asyncio.create_subprocess_exec(
        sys.executable, MANAGER, options, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, process_group=0
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def outcome(process: Process) -> str:
    """``ready``, or the error it ended with."""
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(DEADLINE_S):
        while line := (await process.stdout.readline()).decode().strip():
            if line == "ready":
                return line
        return (await process.stderr.read()).decode().strip().splitlines()[-2]


def roster_of(machines: tiny.Machines) -> Path:
    return SocketPaths(machines.root / "m" / "socket").helpers


@contextlib.asynccontextmanager
async def left_alone(machines: tiny.Machines) -> AsyncIterator[dict[str, int]]:
    """The helpers of a machine whose manager and guard are dead, by name, as pidfds."""
    async with manager(machines) as process:
        assert await outcome(process) == "ready"
        told = json.loads(roster_of(machines).read_text())["helpers"]
        pids = {name: helper["pid"] for name, helper in told.items()}
        assert set(pids) == {"guard", "gvproxy", machines.hypervisor}
        assert Path(told["gvproxy"]["program"]).name == "gvproxy", "not what had confined it"
        with watched.watching(pids) as pidfds:
            guard = pidfds["guard"]
            helpers = {name: fd for name, fd in pidfds.items() if name != "guard"}
            # both stand still first, or the one that dies later would still do its work
            for number in (signal.SIGSTOP, signal.SIGKILL):
                process.send_signal(number)
                signal.pidfd_send_signal(guard, number)
            await process.wait()
            assert watched.gone_within(DEADLINE_S, guard)
            assert watched.still_there(*helpers.values()), "nobody is there to end them"
            yield helpers


async def test_another_process_takes_the_machine_over(machines: tiny.Machines) -> None:
    """It makes and starts it as any other: what was left is ended, what it had opened is swept."""
    async with left_alone(machines) as helpers:
        stale = SocketPaths(roster_of(machines).parent).stale()
        assert {"network.sock", "podman.sock", "ready.sock"} & {path.name for path in stale}
        async with manager(machines) as second:
            assert await outcome(second) == "ready"
            assert watched.gone_within(0, *helpers.values())
            assert json.loads(roster_of(machines).read_text())["manager"]["pid"] == second.pid
    await sweep(await machines())


async def test_a_machine_that_was_made_before_starts(machines: tiny.Machines) -> None:
    """A start alone takes over what another manager's start has left."""
    m = await machines()
    async with left_alone(machines) as helpers:
        async with m.ovm:
            assert watched.gone_within(0, *helpers.values())
            assert await m.tell("echo here") == "here\n"
    assert not roster_of(machines).exists()


@under.QEMU_ALONE
async def test_files_can_be_restored(machines: tiny.Machines) -> None:
    """reset_path() waits for nobody, nor need it: what is left is ended at once."""
    m = await machines()
    async with left_alone(machines) as helpers:
        await m.ovm.reset_path()
        assert watched.gone_within(0, *helpers.values())
    await sweep(m)


@pytest.fixture
def innocents() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that have nothing to do with it."""
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@under.QEMU_ALONE
async def test_whoever_has_a_helpers_pid_by_now_is_not_touched(
    machines: tiny.Machines, innocents: list[subprocess.Popen[bytes]]
) -> None:
    """Neither one that was started at another time, nor one that runs another program; the real ones are ended."""
    m = await machines()
    async with left_alone(machines) as helpers:
        told = json.loads(roster_of(machines).read_text())
        for number, wrong in enumerate(({"started": 1}, {"program": "/usr/bin/gvproxy"}, {"program": ""})):
            who = identity.of(innocents[number].pid)
            assert who is not None
            told["helpers"][f"helper-{number}"] = {
                "pid": who.pid,
                "started": who.started,
                "program": who.program,
            } | wrong
        rewrite(roster_of(machines), told)
        async with m.ovm:
            assert watched.gone_within(0, *helpers.values())
    assert [process.poll() for process in innocents] == [None] * 3


@under.QEMU_ALONE
async def test_helpers_of_nobody_known_are_named(machines: tiny.Machines) -> None:
    """Without the file, or if it is another boot's, nothing is touched: the error says who they are, and what to do."""
    m = await machines()
    async with left_alone(machines) as helpers:
        roster = roster_of(machines)
        told = json.loads(roster.read_text())
        rewrite(roster, told | {"boot_id": "another"})
        assert await refusal(m.ovm.reset_path()) == await refusal(m.ovm.reset_path())
        roster.unlink()
        error = await refusal(m.ovm.reset_path())
        assert watched.still_there(*helpers.values())
        for name in helpers:
            assert f"(process {told['helpers'][name]['pid']})" in error
        assert f"left by process {told['manager']['pid']} ({MANAGER}), which is dead" in error
        for name in helpers:
            os.kill(told["helpers"][name]["pid"], signal.SIGKILL)
        assert watched.gone_within(DEADLINE_S, *helpers.values())
        await m.ovm.reset_path()
    await sweep(m)


@under.QEMU_ALONE
async def test_another_boots_lock_and_roster_stop_nobody(machines: tiny.Machines) -> None:
    """A host that lost its power comes up with both; a lock that is not held is free, whatever its file says."""
    m = await machines()
    async with left_alone(machines) as helpers:
        directories = [roster_of(machines).parent, m.ovm.options.target_dir, m.ovm.options.log_dir]
        notes = {path: json.loads(path.read_text()) for path in (directory / LOCK for directory in directories)}
        told = json.loads(roster_of(machines).read_text())
        await m.ovm.reset_path()
        assert watched.gone_within(0, *helpers.values())
        for path, note in notes.items():
            path.write_text(json.dumps(note | {"boot_id": "another"}))
        ourselves = identity.of(os.getpid())
        assert ourselves is not None
        us = {"pid": ourselves.pid, "started": ourselves.started, "program": ourselves.program}
        rewrite(roster_of(machines), told | {"boot_id": "another", "manager": us, "helpers": {"qemu": us}})
        await m.ovm.reset_path()
        async with m.ovm:
            assert m.events == ["ready"]


@under.QEMU_ALONE
async def test_many_at_once_are_one_after_the_other_or_refused(machines: tiny.Machines) -> None:
    """Programs that make and start the same machine at the same time: one of them has it, and every file is whole."""
    async with contextlib.AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(manager(machines)) for _ in range(3)]
        outcomes = await asyncio.gather(*map(outcome, processes))
        refused = [words for words in outcomes if words != "ready"]
        assert len(refused) == 2
        for words in refused:
            assert words.startswith("ovm.errors.InUseError: "), words
            holder = re.search(r"in use by (?:another process|process (\d+) \()", words)
            assert holder, words
            # whoever has it in the end, had it while it was being made, or has not yet written down that it has it
            assert holder[1] is None or int(holder[1]) in {process.pid for process in processes}, words
        target = machines.root / "m" / "target"
        for origin in map(Path, machines.options()["origin_path"].values()):
            assert (target / origin.name).read_bytes() == origin.read_bytes()
        assert not list(target.glob(".ovm-new*"))
    await sweep(await machines())


async def sweep(m: tiny.Machine) -> None:
    """Have a start take what the dead have left in the directories."""
    starting = m.start_soon()
    await m.until_step("hypervisor")
    await m.ovm.stop(force=True)
    with pytest.raises(ovm.StartError):
        await starting


def rewrite(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


async def refusal(what: Any) -> str:
    with pytest.raises(ovm.InUseError) as caught:
        await what
    return caught.value.message
