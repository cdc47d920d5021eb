"""Rows B2 and B9: root in a guest writes what it likes, as fast as it can, wherever its words reach the host."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
import time

import pytest

import soak
import tiny
from ovm.guest import sparing
from ovm.process import logs

pytestmark = pytest.mark.tiny

KEPT_BYTES = 32 * 1024
SIZE_MAX_BYTES = 64 * 1024
"""Smaller than real ones: an emulated console is slow."""
DEADLINE_S = 120.0
MEMORY_MAX_BYTES = 64 << 20
"""What a manager may take more while it is flooded."""
WORDS = r"warn \033[2J\033]0;owned\007\r2026-01-01 00:00:00 ERROR ovm: forged"
FLOOD = (
    rf"""
for p in /sys/class/virtio-ports/*; do
    [ -e "$p/name" ] && read -r name <"$p/name" && [ "$name" = ovm.ready ] && port=/dev/${{p##*/}}
done
words=$(printf '{WORDS}')
busybox yes "$words" >/dev/console &
[ -z "$port" ] || busybox yes "$words" >$port &
""".replace("\n", ";")
    .replace("do;", "do ")
    .replace("&;", "& ")
    .strip("; ")
)


def peak_bytes() -> int:
    """The most memory that this process, which is the manager, ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


async def test_a_guest_that_floods_all_its_ways_is_kept_small_and_clean(
    machines: tiny.Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The console's log stays near its limit, warnings are few and of one line, memory stays, and commands work."""
    monkeypatch.setattr(logs, "SIZE_MAX_BYTES", SIZE_MAX_BYTES)
    monkeypatch.setattr(logs, "KEPT_BYTES", KEPT_BYTES)
    caplog.set_level(logging.INFO)
    m = await machines()
    async with m.ovm:
        path = logs.log_path(m.ovm.options.log_dir, "console")
        before = peak_bytes()
        await m.order(FLOOD)
        size, most, written, began = 0, 0, 0, time.monotonic()
        async with asyncio.timeout(DEADLINE_S):
            while written < 4 * SIZE_MAX_BYTES:
                await asyncio.sleep(0.1)
                now = path.stat().st_blocks * 512
                written += max(0, now - size)
                size, most = now, max(most, now)
        speed = written / (time.monotonic() - began)
        assert peak_bytes() - before < MEMORY_MAX_BYTES
        await m.ovm.vm_pause()
        await m.ovm.vm_resume()
        assert (await m.tell("echo here")).strip() == "here"
    soak.row("console.log under a flood of the tiny guest", "2 s of it above the limit", f"{most} B at {speed:.0f} B/s")
    assert most <= SIZE_MAX_BYTES + 3 * speed + KEPT_BYTES
    told = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert len(told) <= 2 * (sparing.LINES_MAX + 2)
    assert all(line.isprintable() for line in told)
    assert all(line.isprintable() for line in logs.tail(path))
