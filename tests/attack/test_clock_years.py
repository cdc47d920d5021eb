"""B19: the clock of a guest that thinks it is any year."""

from __future__ import annotations

import calendar
import contextlib
import re
import time
from collections.abc import AsyncIterator

import asyncssh  # noqa: TC002 - where the other tests import it, too
import pytest

import sshds
from ovm.errors import GuestError
from ovm.guest.clock import CLOSE_ENOUGH_S, STEP_MAX_NS, Clock, spoken
from ovm.guest.ssh import make_keys
from ovm.paths import KeyPaths

YEARS = [1, 2, 1000, 1677, 1740, 1800, 1901, 1969, 1970, 1971, 2000, 2038, 2100, 2106, 2200, 2232, 2262, 2400, 9999]
LINUX = range(1970, 2233)
"""Years that the clock of a Linux kernel can be set to."""


class Guest:
    """The clock helper of the image: it takes steps of up to 18 digits, and counts in 64 bits if it is honest."""

    def __init__(self, year: int, *, honest: bool) -> None:
        self.offset_ns = (calendar.timegm((year, 6, 1, 0, 0, 0)) - round(time.time())) * 10**9
        self.honest = honest

    def now(self) -> int:
        ns = time.time_ns() + self.offset_ns
        return (ns + 2**63) % 2**64 - 2**63 if self.honest else ns

    def answer(self, request: str) -> str:
        if step := re.fullmatch(r"s (-?\d{1,18})", request):
            self.offset_ns += int(step[1])
            return str(self.now())
        return str(self.now()) if request == "t" else "error unknown command"

    async def serve(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        while line := await process.stdin.readline():
            process.stdout.write(self.answer(line.decode().strip()).encode() + b"\n")
        process.exit(0)


@pytest.fixture(scope="module")
async def sshd(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[sshds.Sshd]:
    """A guest's sshd."""
    keys = KeyPaths(tmp_path_factory.mktemp("keys"))
    make_keys(keys)
    async with sshds.running(keys) as server:
        yield server


@pytest.mark.parametrize("honest", [True, False], ids=["64 bits", "any number"])
@pytest.mark.parametrize("year", YEARS)
async def test_a_guest_of_any_year_is_set_right_or_told(sshd: sshds.Sshd, year: int, honest: bool) -> None:
    """B19: a clock that Linux can have is set, whatever it shows; any other is an error whose numbers are sane."""
    guest = Guest(year, honest=honest)
    offset_s = guest.offset_ns / 1e9
    sshd.serve = guest.serve
    ssh = sshd.client()
    clock = Clock(ssh)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(ssh.close)
        stack.push_async_callback(clock.close)
        try:
            synced = await clock.sync()
        except GuestError as refused:
            told = refused.message
        else:
            told = ""
    if told:
        assert year not in LINUX
        assert not re.search(r"\d{8}", told), told
        assert "years" in told
        return
    if year in LINUX:
        assert abs(synced.offset_before_s - offset_s) < 5
    assert abs(synced.offset_after_s) <= max(CLOSE_ENOUGH_S, synced.round_trip_s)
    assert not re.search(r"\d{8}", spoken(synced.offset_before_s))
    assert abs(guest.now() - time.time_ns()) < 10**9


def test_a_step_is_one_that_the_guest_takes() -> None:
    """B19: its helper reads 18 digits."""
    assert len(str(STEP_MAX_NS)) == 18


@pytest.mark.parametrize(
    ("offset_s", "words"),
    [
        (0.0, "+0.0 ms"), (-0.0015, "-1.5 ms"), (1.5, "+1500.0 ms"), (90.0, "+90.0 s"), (-86400.0, "-24.0 hours"),
        (864000.0, "+10.0 days"), (-1.8e9, "-57.0 years"), (2.5e11, "+7922.0 years"),
    ],
)  # fmt: skip
def test_an_offset_is_shown_in_its_unit(offset_s: float, words: str) -> None:
    """B19: nobody reads milliseconds of 13 digits."""
    assert spoken(offset_s) == words
