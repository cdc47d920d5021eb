"""What a service has told: numbered, told again to whoever comes later, to its end."""

from __future__ import annotations

import asyncio

from ovm.errors import PortError
from ovm.service import history


def numbers(told: list[history.Event]) -> list[int]:
    return [one.id for one in told]


def test_what_was_missed_is_told():
    kept = history.History()
    for step in ("preparing", "guard", "gvproxy"):
        kept.add("step", step=step)
    assert numbers(kept.known(1)) == [2, 3]
    assert numbers(kept.known(3)) == []


def test_a_number_of_an_earlier_service_is_none_of_ours():
    """Whoever has heard 57 events of the service before would else miss the first 57 of this one."""
    kept = history.History()
    kept.add("ready")
    assert numbers(kept.known(57)) == [1]


def test_the_oldest_are_forgotten():
    kept = history.History()
    for _ in range(history.KEPT + 10):
        kept.add("step", step="x")
    assert numbers(kept.known(0)) == list(range(11, history.KEPT + 11))


async def test_followers_hear_all_of_it_in_order():
    """Whenever they come, and however late they listen."""
    kept = history.History()
    kept.add("ready")

    async def follow(after: int) -> list[int]:
        return [told.id async for told in kept.follow(after)]

    followers = [asyncio.create_task(follow(after)) for after in (0, 1, 57)]
    await asyncio.sleep(0)
    for _ in range(3):
        kept.add("vmPause")
    await asyncio.sleep(0)
    kept.add("close")
    kept.end()
    async with asyncio.timeout(10):
        assert await asyncio.gather(*followers) == [[1, 2, 3, 4, 5], [2, 3, 4, 5], [1, 2, 3, 4, 5]]
        assert await follow(4) == [5]


def test_an_error_is_kept_without_its_traceback():
    """An event keeps what its error says, and none of the frames that raised it."""
    kept = history.History()
    try:
        raise PortError("port 8080 is taken", hint="choose another")
    except PortError as error:
        kept.add("error", error=error)
        said = error.as_dict()
    (event,) = kept.known(0)
    assert event.error is not None
    assert (event.error.__traceback__, event.error.as_dict()) == (None, said)
