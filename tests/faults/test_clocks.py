"""The guest's clock after pauses, after the host's sleep, and after somebody has moved it by hours.

It is measured over a way of the test's own: a program in the guest that tells the time on a port, asked over a new
connection. Half of the fastest round trip is what the measurement itself may be wrong by.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import platform
import struct
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import full
import ovm
import soak
import under
from full import eventually

pytestmark = [
    pytest.mark.full,
    pytest.mark.soak,
    pytest.mark.parametrize("hypervisor", under.HYPERVISORS[:1], indirect=True),  # the double of vfkit is QEMU, too
]
GOOD_ENOUGH_S = 0.020
PORT = 7777
SAMPLES, MANY_SAMPLES = 30, 300
FAST_S = 0.004
TIMEOUT_S = 120.0
HOURS_8 = 8 * 3600
GETTIME = {"x86_64": 228, "aarch64": 113, "arm64": 113}[platform.machine()]
TELL_TIME = f"""\
use Socket;
socket my $s, PF_INET, SOCK_STREAM, 0 or die;
setsockopt $s, SOL_SOCKET, SO_REUSEADDR, 1;
bind $s, sockaddr_in {PORT}, INADDR_ANY or die;
listen $s, 5;
exit if fork;
close $_ for *STDIN, *STDOUT, *STDERR; # or the command would not end
while (accept my $c, $s) {{
    my ($byte, $time) = ('', pack 'q2');
    while (sysread $c, $byte, 1) {{
        syscall {GETTIME}, 0, $time;
        syswrite $c, $time;
    }}
}}
"""


@dataclass(frozen=True)
class Round:
    """What happens to the guest."""

    pause_s: float
    moved_s: float
    sleep: bool
    """Whether the host's sleep pauses it and not its user."""


@dataclass(frozen=True)
class Measured:
    """Guest minus host."""

    offset_s: float
    uncertainty_s: float

    @property
    def good(self) -> bool:
        return abs(self.offset_s) <= GOOD_ENOUGH_S + self.uncertainty_s

    def __str__(self) -> str:
        return f"{self.offset_s * 1000:+.1f} ± {self.uncertainty_s * 1000:.1f} ms"


def rounds(count: int) -> list[Round]:
    """Of twenty, three pauses of a minute, eleven moved clocks, and five sleeps."""
    minute = [number % 6 == 5 for number in range(count)]
    return [
        Round(
            60.0 if minute[number] else 1.0,
            0 if minute[number] else (0, HOURS_8, -HOURS_8)[number % 3],
            number % 4 == 3,
        )
        for number in range(count)
    ]


async def measure(port: int) -> Measured:
    """The fastest of many round trips; of more where the machine is busy."""
    best, offset = math.inf, 0.0
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            for number in range(MANY_SAMPLES):
                if number >= SAMPLES and best < FAST_S:
                    break
                asked, sent = time.time_ns(), time.perf_counter_ns()
                writer.write(b"?")
                seconds, nanoseconds = struct.unpack("<qq", await reader.readexactly(16))
                round_trip = (time.perf_counter_ns() - sent) / 1e9
                if round_trip < best:
                    best = round_trip
                    offset = (seconds * 1_000_000_000 + nanoseconds - asked) / 1e9 - round_trip / 2
    return Measured(offset, best / 2)


@pytest.fixture(scope="module")
async def machine(image: Path, gvproxy: Path, hypervisor: str) -> AsyncIterator[ovm.OVM]:
    """A running machine whose clock nobody else sets: there is no time server."""
    with tempfile.TemporaryDirectory(prefix="ovm-", dir=Path("/tmp").resolve()) as base:
        vfkit = under.vfkit() if hypervisor == "vfkit" else None
        async with await under.create(full.options(Path(base), image, gvproxy, vfkit)) as machine:
            yield machine


async def told_at(machine: ovm.OVM) -> int:
    """A port of the host where the guest tells the time."""
    done = await machine.exec(["perl", "-e", TELL_TIME], timeout_s=TIMEOUT_S)
    assert done.exit_status == 0, done.stderr
    return (await machine.export_port(0, PORT)).host_port


async def move(machine: ovm.OVM, seconds: float) -> None:
    """As a guest's root might."""
    done = await machine.exec(["date", "-s", f"{seconds:+.0f} seconds"], timeout_s=TIMEOUT_S)
    assert done.exit_status == 0, done.stderr


async def test_clock_after_a_pause(machine: ovm.OVM) -> None:
    """However long it took, and however wrong the clock was, it is right when the machine has been resumed."""
    port = await told_at(machine)
    offsets = []
    bad = []
    for number, what in enumerate(all_rounds := rounds(soak.times(20))):
        if what.moved_s:
            await move(machine, what.moved_s)
            assert abs((await measure(port)).offset_s - what.moved_s) < 60, "it can be seen"
        await (machine._pause.before_sleep() if what.sleep else machine.vm_pause())
        await asyncio.sleep(what.pause_s)
        await (machine._pause.after_wake() if what.sleep else machine.vm_resume())
        offsets.append(found := await measure(port))
        if not found.good:
            bad.append(f"round {number}, {what}: {found}")
    worst = max(offsets, key=lambda found: abs(found.offset_s))
    soak.row(
        f"{len(all_rounds)} pauses of 1 s and 60 s, clocks moved by 8 h",
        f"all within {GOOD_ENOUGH_S * 1000:.0f} ms of the host",
        f"{len(all_rounds) - len(bad)}, the worst {worst}",
    )
    assert bad == []


async def test_clock_after_a_reboot(machine: ovm.OVM) -> None:
    """The machine sets it again, soon after its ready, even if the guest had it wrong before."""
    again = asyncio.Event()
    remove = machine.on("ready", again.set)
    await move(machine, -HOURS_8)
    await machine.exec(["systemctl", "start", "--no-block", "reboot.target"])
    async with asyncio.timeout(TIMEOUT_S):
        await again.wait()
    remove()
    port = await told_at(machine)

    async def is_right() -> bool:
        return (await measure(port)).good

    await eventually(is_right)
