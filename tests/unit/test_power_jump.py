"""Jumps of the wall clock, on clocks that the tests set."""

from __future__ import annotations

import asyncio

import pytest

from ovm.power import clock_jump
from ovm.power.clock_jump import JUMP_S
from power import HostClocks, time_to_set, turns


@pytest.mark.parametrize("seconds", [3600.0, -3600.0, JUMP_S + 0.1, -JUMP_S - 0.1])
def test_a_jump_is_found_once(seconds):
    """Whichever way it goes."""
    host = HostClocks()
    host.step(seconds)
    assert host.clocks.jumped()
    assert not host.clocks.jumped()


def test_passing_time_is_no_jump():
    """However long one does not look."""
    host = HostClocks()
    for seconds in (0.0, 5.0, 1e6):
        host.pass_by(seconds)
        assert not host.clocks.jumped()


def test_a_slow_clock_is_no_jump():
    """What is slewed adds up over the days, but it is no wake."""
    host = HostClocks()
    for _ in range(1000):
        host.pass_by(5)
        host.step(0.01)
        assert not host.clocks.jumped()


def test_the_real_clocks_do_not_jump():
    """They are the host's own by default."""
    assert not clock_jump.Clocks().jumped()


async def test_jumps_are_told(monkeypatch):
    """Each once, at the next tick; in between there is silence."""
    host, jumps = HostClocks(), []
    with time_to_set(monkeypatch) as pass_by:
        watch = asyncio.create_task(clock_jump.watch(host.clocks, lambda: jumps.append(host.wall_s)))
        try:
            await turns()
            for told in ([], [1e9 + 100], [1e9 + 100, 1e9 + 200]):
                assert jumps == told
                for _ in range(3):
                    await pass_by(clock_jump.TICK_S + 0.1)
                    assert jumps == told
                host.step(100)
                await turns()
                assert jumps == told
                await pass_by(clock_jump.TICK_S + 0.1)
        finally:
            watch.cancel()
            await asyncio.wait({watch})
