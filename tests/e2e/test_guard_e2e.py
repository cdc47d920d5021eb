"""Managers that die, and directories with two of them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

import ovm
import processes
import tiny

pytestmark = pytest.mark.tiny

MANAGER = Path(__file__).with_name("manager.py")
GONE_S = 2.0
"""What the brief of the guard is; ten times of it is waited before a test fails, for machines are loaded."""


async def manager(machines: tiny.Machines, name: str = "m") -> Process:
    options = json.dumps(machines.options(name))
    return await asyncio.create_subprocess_exec(
        sys.executable, MANAGER, options, stdin=DEVNULL, stdout=PIPE, process_group=0
    )


async def until_said(process: Process, word: str) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(120):
        while (line := (await process.stdout.readline()).decode().strip()) != word:
            assert line, "the manager ended"


async def kill(process: Process) -> None:
    process.kill()
    await process.communicate()


async def seconds_until_gone(root: Path) -> float:
    began = time.monotonic()
    while processes.holders(root) and time.monotonic() < began + 10 * GONE_S:
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_a_killed_manager_leaves_nothing_and_the_next_start_succeeds(machines: tiny.Machines) -> None:
    """The guard ends everything of a killed manager, and the next start succeeds."""
    process = await manager(machines)
    await until_said(process, "ready")
    assert len(processes.holders(machines.root)) >= 4  # guard, gvproxy, the hypervisor (and its helpers), the manager
    await kill(process)
    assert await seconds_until_gone(machines.root) < 10 * GONE_S
    m = await machines()
    async with m.ovm:
        assert m.events == ["ready"]


async def test_a_manager_killed_at_any_moment_of_its_start(machines: tiny.Machines) -> None:
    """A manager that is killed at any moment of a start leaves no process."""
    moments = random.Random(20)
    for _ in range(12):
        process = await manager(machines)
        await until_said(process, "starting")
        await asyncio.sleep(moments.uniform(0, 1.2))
        await kill(process)
        assert await seconds_until_gone(machines.root) < 10 * GONE_S
    m = await machines()  # create and start take what the dead have left
    starting = m.start_soon()
    await m.until_step("hypervisor")
    await m.ovm.stop(force=True)
    with pytest.raises(ovm.StartError):
        await starting


async def test_directories_in_use_say_by_whom(machines: tiny.Machines) -> None:
    """A start with directories in use fails and names the process that uses them."""
    first = await machines()
    early, other = await machines(), await machines()  # made before the first one runs
    starting = first.start_soon()
    await first.until_step("hypervisor")

    async def refused(what: Awaitable[Any]) -> ovm.InUseError:
        with pytest.raises(ovm.InUseError, match=rf"in use by process {os.getpid()} \(.*\), since 2") as caught:
            await what
        assert "stop that machine first" in caught.value.hint
        return caught.value

    async def elsewhere() -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, MANAGER, json.dumps(machines.options()), stdin=DEVNULL, stdout=PIPE, stderr=PIPE
        )
        _, words = await process.communicate()
        return words.decode()

    *_, words = await asyncio.gather(
        refused(early.ovm.start()), refused(other.ovm.reset_path()), refused(machines()), elsewhere()
    )
    assert early.events == ["error", "close"]
    assert f"ovm.errors.InUseError: {machines.root}" in words

    await starting
    assert await first.tell("echo still here") == "still here\n"
    await first.ovm.stop()
    async with early.ovm:
        assert early.state == "Running"
