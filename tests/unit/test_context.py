"""What the parts of a machine share: its state and its tasks."""

from __future__ import annotations

import asyncio
import itertools
import logging
from types import SimpleNamespace

import pytest

from ovm.errors import GuestError, OVMError, StateError, UnsupportedError
from ovm.machine.context import Context
from ovm.model.events import Events
from ovm.model.states import VMState

FOLLOW = {
    "STOPPED": "STARTING RESTORING",
    "STARTING": "RUNNING STOPPING STOPPED ERROR",
    "RUNNING": "PAUSING PAUSED STARTING STOPPING STOPPED SAVING ERROR",
    "PAUSING": "PAUSED RUNNING STOPPING STOPPED ERROR",
    "PAUSED": "RESUMING STOPPING STOPPED SAVING ERROR",
    "RESUMING": "RUNNING PAUSED STOPPING STOPPED ERROR",
    "STOPPING": "STOPPED ERROR",
    "SAVING": "STOPPED RUNNING PAUSED STOPPING ERROR",
    "RESTORING": "RUNNING STARTING STOPPING STOPPED ERROR",
    "ERROR": "RESUMING STOPPING STOPPED STARTING",
}


@pytest.fixture
def context():
    """The context of a machine; ``context.errors`` lists its ``error`` events."""
    context = Context(SimpleNamespace(), Events())
    context.errors = []
    context.events.on("error", context.errors.append)
    return context


@pytest.mark.parametrize(("old", "new"), list(itertools.product(VMState, VMState)))
def test_only_a_state_that_may_follow_is_taken(context, old, new):
    """A state that may not follow is refused with a StateError that names both, and the present one stays."""
    context.state = old
    if new is old or new.name in FOLLOW[old.name].split():
        context.to(new)
        assert context.state is new
    else:
        words = f"the machine is {old.name.lower()} and cannot become {new.name.lower()}"
        with pytest.raises(StateError, match=words) as caught:
            context.to(new)
        assert caught.value.hint.startswith("call stop()")
        assert context.state is old


@pytest.mark.parametrize("state", VMState)
def test_a_call_is_refused_in_other_states(context, state):
    """The session is returned in each of the states that are named, and in no other."""
    context.session, context.state = SimpleNamespace(), state
    named = {VMState.RUNNING, VMState.PAUSED}
    if state in named:
        assert context.require(named, "info") is context.session
    else:
        with pytest.raises(StateError, match=f"info: the machine is {context.spoken()}"):
            context.require(named, "info")


def test_a_call_is_refused_without_a_session(context):
    """A machine that is running by its state alone, without a session, has nothing to call."""
    context.state = VMState.RUNNING
    with pytest.raises(StateError):
        context.require_running("exec")


def test_a_bare_guest_is_not_asked_for_what_needs_an_sshd(context):
    """A call that needs an sshd is unsupported in a guest that has none."""
    context.session, context.state = SimpleNamespace(profile=SimpleNamespace(engine=False)), VMState.RUNNING
    with pytest.raises(UnsupportedError, match="exec: a bare guest has no sshd"):
        context.require_managed("exec")


async def fail(error: Exception, after: asyncio.Event | None = None) -> None:
    if after is not None:
        await after.wait()
    raise error


async def turns() -> None:
    """Long enough for tasks that wait for nothing, and for who is told of their end."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("error", "told"),
    [(GuestError("no answer"), GuestError("no answer")), (KeyError("x"), OVMError("internal error: KeyError('x')"))],
)
async def test_a_background_task_that_raises_is_reported(context, caplog, error, told):
    """A background task that raises is in the log with its traceback, and is one ``error`` event."""
    context.in_background(fail(error))
    await turns()
    assert [(type(e), e.message) for e in context.errors] == [(type(told), told.message)]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[1] is error


async def test_a_background_task_that_fails_while_it_is_stopped_is_only_logged(context, caplog):
    """A stop that was asked for is no failure: what a background task raises then is no event."""
    context.stop.wanted.set()
    context.in_background(fail(GuestError("no answer")))
    await turns()
    assert context.errors == []
    assert "a background task failed" in caplog.text


async def test_a_background_task_that_is_cancelled_is_no_failure(context, caplog):
    """The end of a session cancels its tasks, which is neither logged nor an event; what one raises then is logged."""

    async def stumble() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise GuestError("it was closed")

    context.in_background(asyncio.Event().wait())
    await turns()
    context.end_background()
    await turns()
    assert (context.errors, caplog.text) == ([], "")
    context.in_background(stumble())
    await turns()
    context.end_background()
    await turns()
    assert context.errors == []
    assert "it was closed" in caplog.text


async def test_a_change_is_finished_and_its_error_kept_when_its_caller_is_gone(context, caplog):
    """The error of a change whose caller was cancelled is logged and an ``error`` event."""
    may = asyncio.Event()
    caller = asyncio.create_task(context.run_to_end(fail(GuestError("QEMU refused stop"), may)))
    await turns()
    caller.cancel()
    await turns()
    assert caller.cancelled()
    may.set()
    await turns()
    assert [error.message for error in context.errors] == ["QEMU refused stop"]
    assert "QEMU refused stop" in caplog.text


async def test_a_change_that_fails_is_told_to_its_caller_alone(context, caplog):
    """The error of a change is raised to its caller, and is neither logged nor an event."""
    with pytest.raises(GuestError, match="QEMU refused stop"):
        await context.run_to_end(fail(GuestError("QEMU refused stop")))
    await turns()
    assert (context.errors, caplog.text) == ([], "")


async def test_a_progress_callback_that_raises_hurts_nobody(context, caplog):
    """Every other callback gets the step, and the log has the failure."""
    steps: list[str] = []
    context.progress = [lambda _: 1 / 0, steps.append]
    context.step_done("guard")
    assert (steps, [stage.name for stage in context.stages]) == (["guard"], ["guard"])
    assert "a progress callback raised" in caplog.text
