"""Events: in order, to everybody, hurting nobody."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from ovm.errors import GuestError, OptionError
from ovm.model.events import EVENT_NAMES, Events


async def take(stream, count):
    async with asyncio.timeout(5):
        return [await anext(stream) for _ in range(count)]


async def test_a_stream_gets_every_event_in_order():
    """An iterator gets all events since it was asked for, numbered without gaps."""
    events = Events()
    events.emit("ready")
    stream = events.stream()
    for name in ("vmPause", "vmResume", "close"):
        events.emit(name)
    got = await take(stream, 3)
    assert [(e.id, e.name) for e in got] == [(2, "vmPause"), (3, "vmResume"), (4, "close")]


async def test_each_stream_has_its_own_queue():
    """What one iterator has taken is still there for another, however slow."""
    events = Events()
    quick, slow = events.stream(), events.stream()
    events.emit("ready")
    events.emit("close")
    assert await take(quick, 2) == await take(slow, 2)


async def test_a_dropped_stream_is_forgotten():
    """An iterator that nobody holds any more collects nothing, even if it was never read."""
    events = Events()
    kept, dropped = events.stream(), events.stream()
    assert len(events._streams) == 2
    del dropped
    gc.collect()
    assert len(events._streams) == 1
    events.emit("ready")
    assert (await take(kept, 1))[0].name == "ready"


async def test_streams_take_part_in_async_for():
    """``async for`` over the events works and can be left."""
    events = Events()
    stream = events.stream()
    events.emit("ready")
    async for event in stream:
        assert event.name == "ready"
        break


@pytest.mark.parametrize("name", EVENT_NAMES)
async def test_a_listener_hears_its_own_event_only(name):
    """``on(name)`` is called at that event and no other; only ``error`` passes something."""
    events, heard = Events(), []
    events.on(name, lambda *passed: heard.append(passed))
    failure = GuestError("it failed")
    for each in EVENT_NAMES:
        events.emit(each, failure if each == "error" else None)
    assert heard == [(failure,) if name == "error" else ()]


async def test_listeners_are_called_in_the_order_they_came():
    """Two listeners of one event are called in the order they were added."""
    events, heard = Events(), []
    events.on("ready", lambda: heard.append("first"))
    events.on("ready", lambda: heard.append("second"))
    events.emit("ready")
    assert heard == ["first", "second"]


async def test_a_failing_listener_hurts_nobody(caplog):
    """A listener that raises is logged; those behind it are called all the same."""
    events, heard = Events(), []
    events.on("ready", lambda: 1 / 0)
    events.on("ready", lambda: heard.append(1))
    with caplog.at_level(logging.ERROR, "ovm.model.events"):
        events.emit("ready")
    assert heard == [1]
    assert "an event listener for ready raised" in caplog.text


async def test_async_listeners_run(caplog):
    """A coroutine function is run to its end; what it raises is logged."""
    events, heard, failed = Events(), asyncio.Event(), asyncio.Event()

    async def good():
        await asyncio.sleep(0)
        heard.set()

    async def bad():
        try:
            raise RuntimeError("no")
        finally:
            failed.set()

    events.on("close", bad)
    events.on("close", good)
    with caplog.at_level(logging.ERROR, "ovm.model.events"):
        events.emit("close")
        async with asyncio.timeout(5):
            await heard.wait()
            await failed.wait()
            while events._running:
                await asyncio.sleep(0)
    assert "an asynchronous event listener raised" in caplog.text


async def test_a_removed_listener_is_called_no_more():
    """What ``on`` returned takes away that registration, once; a second call does nothing."""
    events, heard = Events(), []

    def listener():
        heard.append(1)

    remove = events.on("ready", listener)
    events.on("ready", listener)
    remove()
    remove()
    events.emit("ready")
    assert heard == [1]


async def test_a_listener_may_remove_itself():
    """Removing a listener while it is called skips none of the others."""
    events, heard = Events(), []
    removers = [events.on("ready", lambda: (heard.append("once"), removers[0]()))]
    events.on("ready", lambda: heard.append("always"))
    events.emit("ready")
    events.emit("ready")
    assert heard == ["once", "always", "always"]


def test_an_unknown_event_is_refused():
    """A misspelt event is an OptionError that lists the five."""
    with pytest.raises(OptionError, match="no event 'reday'") as caught:
        Events().on("reday", print)
    assert all(name in caught.value.hint for name in EVENT_NAMES)
