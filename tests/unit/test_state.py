"""The ten states, and which may follow which."""

from __future__ import annotations

import pytest

from ovm.model.states import TRANSITIONS, VMState, may_follow, state_info

S = VMState


def test_the_states_are_the_seeds():
    """The ten strings are those of the seed, to the letter."""
    names = [
        "Stopped",
        "Running",
        "Paused",
        "Error",
        "Starting",
        "Pausing",
        "Resuming",
        "Stopping",
        "Saving",
        "Restoring",
    ]
    assert [state.value for state in VMState] == [f"VirtualMachineState{name}" for name in names]


@pytest.mark.parametrize("state", VMState)
def test_every_state_can_be_stayed_in_and_left(state):
    """No state is a trap: each may stay, and each may go on to another."""
    assert may_follow(state, state)
    assert TRANSITIONS[state] - {state}


@pytest.mark.parametrize("state", VMState)
def test_stopped_can_be_reached_from_every_state(state):
    """Whatever a machine is at, it can end up stopped."""
    seen, front = {state}, {state}
    while front:
        front = {after for before in front for after in TRANSITIONS[before]} - seen
        seen |= front
    assert S.STOPPED in seen


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        (S.STOPPED, S.STARTING, True),
        (S.STOPPED, S.RUNNING, False),
        (S.STOPPED, S.STOPPING, False),
        (S.STOPPED, S.PAUSED, False),
        (S.STARTING, S.RUNNING, True),
        (S.STARTING, S.PAUSED, False),
        (S.RUNNING, S.STARTING, True),  # the guest reboots itself
        (S.RUNNING, S.RESUMING, False),
        (S.PAUSED, S.RUNNING, False),  # only by way of RESUMING
        (S.PAUSED, S.RESUMING, True),
        (S.PAUSED, S.STOPPING, True),
        (S.STOPPING, S.RUNNING, False),
        (S.STOPPING, S.STARTING, False),
        (S.ERROR, S.RUNNING, False),
        (S.ERROR, S.STOPPED, True),
    ],
)
def test_transitions(old, new, allowed):
    """The table of transitions allows exactly the sensible ones."""
    assert may_follow(old, new) is allowed


def test_every_state_but_stopped_may_turn_out_an_error():
    """A machine that is up can fail at any moment."""
    assert {s for s in VMState if not may_follow(s, S.ERROR)} == {S.STOPPED}


@pytest.mark.parametrize(
    ("state", "can"),
    [
        (S.STOPPED, ""),
        (S.STARTING, "stop hard_stop"),
        (S.RUNNING, "pause stop hard_stop"),
        (S.PAUSED, "resume stop hard_stop"),
        (S.PAUSING, "stop hard_stop"),
        (S.RESUMING, "stop hard_stop"),
        (S.STOPPING, "hard_stop"),
        (S.SAVING, "stop hard_stop"),
        (S.RESTORING, "stop hard_stop"),
        (S.ERROR, "resume stop hard_stop"),
    ],
)
def test_what_can_be_asked_of_a_machine(state, can):
    """``vm_state`` offers what fits the state and nothing else."""
    info = state_info(state)
    assert info.state is state
    offered = {name for name in ("pause", "resume", "stop", "hard_stop") if getattr(info, f"can_{name}")}
    assert offered == set(can.split())
