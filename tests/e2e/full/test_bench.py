"""The benchmark itself, each thing once and small: that it measures everything, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench import plan
from bench.goals import GOALS
from bench.result import Result
from processes import holders

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[3]
DEADLINE_S = 300.0
MAY_BE_MISSING = {"cold start: stock", "clone: ovm, btrfs", "suspend", "warm start"}
"""What is left out of a smoke run, takes root, or a machine that can be suspended."""
HELPERS = 3


@pytest.fixture
def environment(gvproxy: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{gvproxy.parent}:{os.environ['PATH']}"}


async def begin(image: Path, environment: dict[str, str], *more: str) -> asyncio.subprocess.Process:
    argv = [sys.executable, "-m", "bench", "--smoke", "--image", str(image), *more]
    return await asyncio.create_subprocess_exec(
        *argv, cwd=ROOT, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
    )


def left() -> list[Path]:
    return list(plan.SCRATCH.glob("ovm-bench-*"))


async def test_a_smoke_run(image, environment, tmp_path):
    """Every row is measured that is said to be, the result can be read again, and nothing is left."""
    before = left()
    wanted = tmp_path / "result.json", tmp_path / "result.svg"
    process = await begin(image, environment, "--json", str(wanted[0]), "--svg", str(wanted[1]))
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    told = out.decode() + err.decode()
    assert process.returncode == 0, told
    result = Result.load(wanted[0])
    assert plan.ROWS - set(result.rows) == set(result.missing), told
    assert set(result.missing) <= MAY_BE_MISSING, told
    assert all(f"\n{goal.name} " in out.decode() for goal in GOALS)
    ET.fromstring(wanted[1].read_text())
    assert left() == before


async def test_an_interrupted_run_leaves_nothing(image, environment):
    """Ctrl-C while the machines boot: no process, no mount, no file."""
    before = left()
    process = await begin(image, environment)
    assert process.stderr is not None
    async with asyncio.timeout(DEADLINE_S):
        while (line := await process.stderr.readline()) and b"cold starts" not in line:
            pass
        (work,) = set(left()) - set(before)
        while len(holders(work)) <= HELPERS:  # until the machine boots
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGINT)
        await process.communicate()
    assert process.returncode == 130
    assert left() == before
    assert holders(work) == []
    assert str(work) not in Path("/proc/self/mounts").read_text()
