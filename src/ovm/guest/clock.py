"""Set the guest's clock from the host's.

A helper in the guest returns its time and applies relative steps. The offset comes from the fastest of several round
trips, assuming that each direction takes half of it (a simplified RFC 5905 on-wire protocol). A relative step stays
correct while in transit. So the error is half the *asymmetry* of the best round trip, not the duration of a command.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovm.errors import GuestError
from ovm.guest.ssh import converse
from ovm.model.results import ClockSync

if TYPE_CHECKING:
    import asyncssh

    from ovm.guest.ssh import SSH

HELPER = ("/usr/lib/ovm/clock",)
KICK_CHRONY = ("/usr/lib/ovm/chrony-kick",)

_IN_SHELL = """\
now() { date +%s%N; }
while read -r verb by; do
    case $verb in
    t) now ;;
    s) # date -s takes effect one run of date later, so add the time of one
        before=$(now)
        t=$(now)
        t=$((t + t - before + by))
        date -s "@$((t / 1000000000)).$(printf %09d $((t % 1000000000)))" >/dev/null
        now
        ;;
    esac
done
"""
CORE_HELPER = ("sh", "-c", _IN_SHELL)
"""The helper for guests of the seed; its error is the difference between two start times of ``date``."""
CORE_GOOD_ENOUGH_S = 0.25
"""Tolerated offset of such a guest on a slow host; the seed itself set whole seconds."""
CORE_KICK = ("systemctl", "restart", "chrony")

CLOSE_ENOUGH_S = 0.002
QUICK_S = 2 * CLOSE_ENOUGH_S
"""A round trip this short is exact enough: its offset is wrong by at most half its duration."""
SAMPLES = 8
"""Most round trips of one measurement, if none is that short."""
ATTEMPTS = 4
ANSWER_TIMEOUT_S = 10.0

_NANOSECONDS = re.compile(r"-?[0-9]{1,21}")
STEP_MAX_NS = 10**18 - 1
"""About 31 years, because the guest's helper takes 18 digits. Larger offsets take several steps."""
OFF_MAX_S = 9_000_000_000.0
"""About 285 years. The kernel's clock counts nanoseconds since 1970 in 64 bits, so no real clock is further off."""
_UNITS = ((365.25 * 86400, "years"), (86400.0, "days"), (3600.0, "hours"), (1.0, "s"))


def spoken(offset_s: float) -> str:
    """Format an offset in a suitable unit: ``+1.5 ms``, ``-3.0 hours``, ``+73.1 years``."""
    for unit_s, name in _UNITS:
        if abs(offset_s) >= 2 * unit_s:
            return f"{offset_s / unit_s:+.1f} {name}"
    return f"{offset_s * 1000:+.1f} ms"


@dataclass(frozen=True, slots=True, order=True)
class _Sample:
    """One round trip; the shortest sorts first."""

    round_trip_s: float
    offset_s: float

    @property
    def is_telling(self) -> bool:
        """Whether the offset is exact, or so large that the clock is certainly wrong."""
        return self.round_trip_s <= QUICK_S or abs(self.offset_s) > self.round_trip_s


class Clock:
    """The clock of a running guest, accessed through a helper process that stays open."""

    def __init__(
        self,
        ssh: SSH,
        *,
        helper: Sequence[str] = HELPER,
        kick: Sequence[str] = KICK_CHRONY,
        good_enough_s: float = CLOSE_ENOUGH_S,
    ) -> None:
        self._ssh = ssh
        self._good_enough_s = good_enough_s
        self._helper = helper
        self._kick = kick
        self._stack = AsyncExitStack()
        self._process: asyncssh.SSHClientProcess[bytes] | None = None
        self._turn = asyncio.Lock()

    async def sync(self) -> ClockSync:
        """Set the guest's clock to the host's and verify it.

        Raises:
            GuestError: the guest cannot be reached, or its clock stays off.
        """
        async with self._turn:
            before = after = await self._measured()
            for _ in range(ATTEMPTS):
                if abs(after.offset_s) <= CLOSE_ENOUGH_S:
                    break
                after = await self._set_right(after.offset_s)
            if abs(after.offset_s) > max(self._good_enough_s, after.round_trip_s):
                raise GuestError(f"the guest's clock stayed {spoken(after.offset_s)} off")
            return ClockSync(before.offset_s, after.offset_s, after.round_trip_s)

    async def _set_right(self, offset_s: float) -> _Sample:
        """Correct the offset in as few steps as the helper allows."""
        if abs(offset_s) > OFF_MAX_S:
            raise GuestError(
                f"the guest's clock is {spoken(offset_s)} off, which is impossible for a Linux clock",
                hint="restart the machine: its clock starts at the host's time",
            )
        left = round(-offset_s * 1e9)
        while abs(left) > STEP_MAX_NS:
            step = STEP_MAX_NS if left > 0 else -STEP_MAX_NS
            await self._ask(f"s {step}")
            left -= step
        return await self._measured(f"s {left}")

    async def offset(self) -> float:
        """Return guest time minus host time, in seconds."""
        async with self._turn:
            return (await self._measured()).offset_s

    async def _measured(self, first: str = "t") -> _Sample:
        """Return the best sample, taking only as many as needed. The request ``first`` makes the first one."""
        samples = [best := await self._sample(first)]
        while not best.is_telling and len(samples) < SAMPLES:
            samples.append(await self._sample("t"))
            best = min(samples)
        return best

    async def _sample(self, request: str) -> _Sample:
        sent, began = time.time(), time.perf_counter()
        guest = int(await self._ask(request)) / 1e9
        round_trip = time.perf_counter() - began
        return _Sample(round_trip, guest - (sent + round_trip / 2))

    async def _ask(self, request: str) -> str:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await self._exchange(request)
        except TimeoutError:
            await self.close()
            raise GuestError(f"the guest's clock helper did not answer within {ANSWER_TIMEOUT_S:g} s") from None
        except asyncio.CancelledError:
            await self.close()  # or the next request would read this one's answer
            raise
        if not _NANOSECONDS.fullmatch(answer):
            await self.close()
            raise GuestError(f"the guest's clock helper answered {answer!r:.200}")
        return answer

    async def _exchange(self, request: str) -> str:
        """Send a request; retry once over a new connection if the old one is lost."""
        for last in (False, True):
            if self._process is None:
                self._process = await self._stack.enter_async_context(self._ssh.process(self._helper))
            if answer := await converse(self._process, request.encode()):
                return answer.decode(errors="replace").strip()
            await self.close()
            if last:
                break
        raise GuestError("the guest's clock helper ended")

    async def kick_chrony(self) -> None:
        """Make chrony query its servers now."""
        await self._ssh.exec(self._kick, timeout_s=ANSWER_TIMEOUT_S)

    async def close(self) -> None:
        """End the helper."""
        self._process = None
        stack, self._stack = self._stack, AsyncExitStack()
        await stack.aclose()
