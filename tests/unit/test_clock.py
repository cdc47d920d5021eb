"""The guest's clock, set over a helper with an artificial clock of its own."""

from __future__ import annotations

import asyncio
import time

import pytest

from ovm.errors import GuestError
from ovm.guest import clock as clock_module
from ovm.guest.clock import CLOSE_ENOUGH_S, KICK_CHRONY, Clock


class GuestClock:
    """The clock helper of the contract, on a clock that is ``offset_s`` seconds off."""

    def __init__(self, offset_s: float, *, there_s: float = 0.0, back_s: float = 0.0) -> None:
        self.offset_s = offset_s
        self.there_s, self.back_s = there_s, back_s
        self.asked: list[str] = []
        self.starts = 0
        self.obeys = True
        self.dies_after = 1 << 30

    def now(self) -> bytes:
        return b"%d\n" % round((time.time() + self.offset_s) * 1e9)

    def answer(self, request: str) -> bytes:
        self.asked.append(request)
        if request.startswith("s ") and self.obeys:
            self.offset_s += int(request[2:]) / 1e9
        return self.now()

    async def serve(self, process) -> None:
        self.starts += 1
        left = self.dies_after
        while line := await process.stdin.readline():
            if left == 0:
                break
            left -= 1
            if self.there_s:
                await asyncio.sleep(self.there_s)
            answer = self.answer(line.decode().strip())
            if self.back_s:
                await asyncio.sleep(self.back_s)
            process.stdout.write(answer)
        process.exit(0)


@pytest.fixture
async def clock(ssh):
    """A guest's clock."""
    clock = Clock(ssh)
    yield clock
    await clock.close()


@pytest.mark.parametrize("offset", [0.0, 0.5, -0.5, 86400.0, -1e8, 3e8, -1.8e9, 2.4e9])
async def test_a_wrong_clock_is_set(sshd, clock, offset):
    """However wrong, the offset is found, and afterwards the clock is right."""
    guest = GuestClock(offset)
    sshd.serve = guest.serve
    result = await clock.sync()
    assert abs(result.offset_before_s - offset) <= 0.1
    assert abs(result.offset_after_s) <= max(CLOSE_ENOUGH_S, result.round_trip_s)
    assert abs(guest.offset_s) <= max(CLOSE_ENOUGH_S, result.round_trip_s) + 0.01


async def test_a_right_clock_is_left_alone(sshd, clock):
    """A clock that is right takes no step."""
    guest = GuestClock(0.0)
    sshd.serve = guest.serve
    await clock.sync()
    assert set(guest.asked) == {"t"}


@pytest.mark.parametrize(("there", "back"), [(0.008, 0.0), (0.0, 0.008), (0.004, 0.004)])
async def test_the_error_is_within_half_the_round_trip(sshd, clock, there, back):
    """However unevenly the way there and back take their time, the offset is wrong by half of it at most."""
    sshd.serve = GuestClock(5.0, there_s=there, back_s=back).serve
    best = await clock._measured()
    assert abs(best.offset_s - 5.0) <= best.round_trip_s / 2 + 0.001
    assert best.round_trip_s >= there + back


async def test_it_is_asked_no_oftener_than_needed(sshd, clock, monkeypatch):
    """A clock that is wrong beyond doubt is set at once; the step's own answer is the first that verifies it."""
    guest = GuestClock(3600.0)
    sshd.serve = guest.serve
    monkeypatch.setattr(clock_module, "QUICK_S", 0.0)
    await clock.sync()
    assert [request[0] for request in guest.asked[:2]] == ["t", "s"]
    guest.asked.clear()
    monkeypatch.setattr(clock_module, "QUICK_S", 60.0)
    await clock.offset()
    assert guest.asked == ["t"]


async def test_one_that_is_nearly_right_is_asked_until_it_is_known(sshd, clock, monkeypatch):
    """A slow answer cannot tell a clock that is right from one that is a little wrong."""
    guest = GuestClock(0.0, there_s=0.005, back_s=0.005)
    sshd.serve = guest.serve
    monkeypatch.setattr(clock_module, "QUICK_S", 0.0)
    await clock.offset()
    assert guest.asked == ["t"] * clock_module.SAMPLES


async def test_the_helper_is_kept(sshd, clock):
    """Several synchronisations use one helper process."""
    guest = GuestClock(1.0)
    sshd.serve = guest.serve
    await clock.sync()
    await clock.sync()
    assert abs(await clock.offset()) < 0.1
    assert guest.starts == 1
    assert sshd.commands == ["/usr/lib/ovm/clock"]


async def test_a_helper_that_died_is_started_again(sshd, clock, monkeypatch):
    """A helper that has ended since is asked once more as a new one."""
    monkeypatch.setattr(clock_module, "QUICK_S", 60.0)
    guest = GuestClock(1.0)
    guest.dies_after = 1
    sshd.serve = guest.serve
    for _ in range(2):
        assert abs(await clock.offset() - 1.0) < 0.1
    assert guest.starts == 2


async def test_a_lost_connection_is_made_anew(sshd, clock):
    """The clock can be set after the connection was lost."""
    guest = GuestClock(1.0)
    sshd.serve = guest.serve
    await clock.sync()
    sshd.connections[0].abort()
    assert abs((await clock.sync()).offset_after_s) < 0.1


async def test_a_helper_that_dies_each_time_is_an_error(sshd, clock):
    """A helper that never answers but ends is asked twice, and then an error."""
    guest = GuestClock(1.0)
    guest.dies_after = 0
    sshd.serve = guest.serve
    with pytest.raises(GuestError, match="clock helper ended"):
        await clock.sync()
    assert guest.starts == 2


@pytest.mark.parametrize("said", ["error not permitted", "", "--5", "1.5", "²", "9" * 5000, "\x1b[2J"])
async def test_rubbish_is_an_error(sshd, clock, said):
    """An answer that is no number is a GuestError that shows it, and steps no clock."""
    guest = GuestClock(1.0)
    guest.answer = lambda _request: said.encode() + b"\n"
    sshd.serve = guest.serve
    with pytest.raises(GuestError, match="clock helper answered") as caught:
        await clock.sync()
    assert len(caught.value.message) < 300


async def test_half_an_answer_is_none(sshd, clock):
    """A helper that ends in the middle of its answer is not taken at its word."""

    async def cut_off(process) -> None:
        await process.stdin.readline()
        process.stdout.write(b"17")
        process.exit(0)

    sshd.serve = cut_off
    with pytest.raises(GuestError, match="clock helper ended"):
        await clock.sync()


async def test_a_clock_that_does_not_obey_is_told(sshd, clock):
    """A guest whose clock stays wrong is an error that says by how much."""
    guest = GuestClock(2.0)
    guest.obeys = False
    sshd.serve = guest.serve
    with pytest.raises(GuestError, match=r"clock stayed \+((1\d{3}\.\d|2000\.0) ms|2\.0 s) off"):
        await clock.sync()


async def test_a_silent_helper_is_given_up(sshd, clock, monkeypatch):
    """A helper that says nothing is given up, and the next time a new one is asked."""
    monkeypatch.setattr(clock_module, "ANSWER_TIMEOUT_S", 0.05)

    async def silent(process) -> None:
        await process.stdin.read()

    sshd.serve = silent
    with pytest.raises(GuestError, match=r"did not answer within 0\.05 s"):
        await clock.sync()
    monkeypatch.setattr(clock_module, "ANSWER_TIMEOUT_S", 5.0)
    sshd.serve = GuestClock(1.0).serve
    await clock.sync()


async def test_a_cancelled_question_spoils_no_later_one(sshd, clock):
    """After a synchronisation was cancelled, its late answer is not taken for that to a later question."""
    guest = GuestClock(0.0)
    held, asked = asyncio.Event(), asyncio.Event()

    async def slow(process) -> None:
        first = await process.stdin.readline()
        late = guest.answer(first.decode().strip())
        asked.set()
        await held.wait()
        process.stdout.write(late)
        await guest.serve(process)

    sshd.serve = slow
    task = asyncio.create_task(clock.sync())
    async with asyncio.timeout(5):
        await asked.wait()
        task.cancel()
        await asyncio.wait({task})
    guest.offset_s = 100.0  # what was true then is not true now
    held.set()
    sshd.serve = guest.serve
    result = await clock.sync()
    assert abs(result.offset_before_s - 100.0) < 1
    assert abs(guest.offset_s) < 0.1


async def test_two_at_once_take_turns(sshd, clock):
    """Two synchronisations at the same time do not get each other's answers."""
    guest = GuestClock(1.0)
    sshd.serve = guest.serve
    first, second = await asyncio.gather(clock.sync(), clock.sync())
    assert abs(first.offset_before_s - 1.0) < 0.1
    assert abs(second.offset_before_s) < 0.1


async def test_chrony_is_kicked(sshd, clock):
    """Kicking chrony runs the guest's own command for it."""

    async def ok(process) -> None:
        process.exit(0)

    sshd.serve = ok
    await clock.kick_chrony()
    assert sshd.commands == list(KICK_CHRONY)
