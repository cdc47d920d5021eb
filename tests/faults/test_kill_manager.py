"""The manager is killed, at any moment of a machine's life: nothing is left, and the next start is as any other."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

import processes
import soak
import tiny
from adopted import Adopted, adopting

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans"),
]

VICTIM = Path(__file__).with_name("victim.py")
ROUNDS = {"qemu": 60, "vfkit": 20}
GONE_S = 2.0
"""Promised, from the kill on."""
GIVEN_UP_S = 30.0
LIFE_S = 300.0
LOOK_S = 0.01
HOW = ("as programs are", "in a thread", "in a fork")
COMPANY = ("none", "forked", "executed")
DATA = b"what people keep"
DATA_AT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Round:
    """What is done to a manager. It dies ``delay_s`` behind a moment of a phase."""

    number: int
    phase: str
    moment: int
    delay_s: float
    how: str
    company: str
    force: bool


Life = dict[str, tuple[int, float]]
"""How many moments and seconds each phase has."""


def plan(life: Life, count: int, random: Random) -> list[Round]:
    """Every phase in turn; half of the kills come between two calls, half at any time."""
    phases = [*life]
    random.shuffle(phases)
    rounds = []
    for number, phase in zip(range(count), itertools.cycle(phases), strict=False):
        moments, seconds = life[phase]
        by_moment = moments > 0 and random.random() < 0.5
        rounds.append(
            Round(
                number=number,
                phase=phase,
                moment=random.randint(1, moments) if by_moment else 0,
                delay_s=0.0 if by_moment else random.uniform(0, seconds),
                how=random.choice(HOW),
                company=random.choice(COMPANY),
                force=random.random() < 0.3,
            )
        )
    return rounds


async def live(machines: tiny.Machines, told: Path, one: Round | None = None) -> dict[str, str]:
    """A victim's life; what it said, by its first word."""
    given = {
        "root": str(machines.root),
        "options": machines.options(),
        "fate": [one.phase, one.moment, one.delay_s] if one else [],
        "how": one.how if one else HOW[0],
        "company": one.company if one else COMPANY[0],
        "force": one.force if one else False,
    }
    # into a file: a pipe's end would be kept open by its forks
    with told.open("wb") as output, subprocess.Popen(
        [sys.executable, VICTIM, json.dumps(given)],
        stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0,
    ) as process:  # fmt: skip
        try:
            async with asyncio.timeout(LIFE_S):
                while process.poll() is None:
                    await asyncio.sleep(LOOK_S)
        finally:
            process.kill()
    return dict(line.split(" ", 1) for line in told.read_text().splitlines() if " " in line)


async def seconds_until_gone(adopted: Adopted, struck: float) -> float:
    """From the kill until nothing is left.

    Less the time for which this process, which sleeps like theirs, was itself made to wait for a processor: on a
    machine that is overloaded by others nobody can keep a promise in seconds.
    """
    late = 0.0
    while time.monotonic() < struck + GIVEN_UP_S:
        looked = time.monotonic()
        if not adopted.left() and not adopted.left():  # twice: what changes its parent between two looks is in neither
            return looked - struck - late
        slept = time.monotonic()
        await asyncio.sleep(LOOK_S)
        late += time.monotonic() - slept - LOOK_S
    return GIVEN_UP_S


@contextlib.contextmanager
def company(said: dict[str, str], adopted: Adopted) -> Iterator[None]:
    """The victim's own child, which is to live, until the end of this."""
    if "company" not in said:
        yield
        return
    pid = int(said["company"])
    adopted.known.add(pid)
    assert processes.command(pid) not in {"", processes.GONE}, "what the manager's user had started was killed"
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


async def kill(machines: tiny.Machines, told: Path, one: Round) -> float:
    """One round; returns how many seconds it took until all was gone."""
    data_disk = machines.root / "m" / "target" / "data.img"
    before = data_disk.stat().st_ino
    with adopting() as adopted:
        said = await live(machines, told, one)
        assert "struck" in said, told.read_text()
        with company(said, adopted):
            seconds = await seconds_until_gone(adopted, float(said["struck"]))
            left = adopted.left()
            shown = [processes.command(pid) for pid in left]
            for pid in left:  # or the next rounds would fail with this one
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert seconds <= GONE_S, f"after {seconds:.2f} s: {shown}"
            locks = [path for path in machines.root.glob("*/*/ovm.lock") if tiny._is_locked(path)]
            assert not locks, locks

            m = await machines()
            async with m.ovm:
                assert m.events == ["ready"]
            assert m.errors == []
    with data_disk.open("rb") as file:
        file.seek(DATA_AT)
        assert (data_disk.stat().st_ino, file.read(len(DATA))) == (before, DATA), "the data disk is another one"
    assert await machines.leftovers() == []
    return seconds


async def test_a_manager_killed_at_any_moment_of_its_life(machines: tiny.Machines, tmp_path: Path) -> None:
    """Within 2 s all that it had started is gone, its locks are free, and the next start succeeds."""
    told = tmp_path / "told"
    with adopting() as adopted:
        said = await live(machines, told)
        assert "lived" in said, told.read_text()
        assert adopted.left() == []
    life: Life = json.loads(said["lived"])
    with (machines.root / "m" / "target" / "data.img").open("r+b") as file:
        file.seek(DATA_AT)
        file.write(DATA)

    rounds = plan(life, soak.times(ROUNDS[machines.hypervisor]), soak.random("kill the manager"))
    seconds, failures = [], []
    for one in rounds:
        try:
            seconds.append(await kill(machines, told, one))
        except Exception as error:  # noqa: BLE001 - the other rounds are worth as much
            failures.append(f"seed {soak.SEED}, {dataclasses.asdict(one)}: {error!r}")
            await machines.made[-1].ovm.stop(force=True)
    phases = len({one.phase for one in rounds})
    soak.row(
        f"{len(rounds)} SIGKILLs of the manager in {phases} of {len(life)} phases, {machines.hypervisor}",
        f"0 processes after {GONE_S:g} s, 0 failed next starts",
        f"{len(failures)} failed; gone after {statistics.median(seconds or [0]):.2f} s, "
        f"at most {max(seconds, default=0):.2f} s",
    )
    assert not failures, "\n".join(failures)
