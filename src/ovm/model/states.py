"""The ten states of a virtual machine, and the allowed transitions.

The strings are those of Apple's framework, as the seed reports them. They are the same on every hypervisor.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class VMState(StrEnum):
    """One of the ten ``VirtualMachineState…`` strings."""

    STOPPED = "VirtualMachineStateStopped"
    RUNNING = "VirtualMachineStateRunning"
    PAUSED = "VirtualMachineStatePaused"
    ERROR = "VirtualMachineStateError"
    STARTING = "VirtualMachineStateStarting"
    PAUSING = "VirtualMachineStatePausing"
    RESUMING = "VirtualMachineStateResuming"
    STOPPING = "VirtualMachineStateStopping"
    SAVING = "VirtualMachineStateSaving"
    RESTORING = "VirtualMachineStateRestoring"


_S = VMState

TRANSITIONS: dict[VMState, frozenset[VMState]] = {
    _S.STOPPED: frozenset({_S.STARTING, _S.RESTORING}),
    _S.STARTING: frozenset({_S.RUNNING, _S.STOPPING, _S.STOPPED, _S.ERROR}),
    _S.RUNNING: frozenset({_S.PAUSING, _S.PAUSED, _S.STARTING, _S.STOPPING, _S.STOPPED, _S.SAVING, _S.ERROR}),
    _S.PAUSING: frozenset({_S.PAUSED, _S.RUNNING, _S.STOPPING, _S.STOPPED, _S.ERROR}),
    _S.PAUSED: frozenset({_S.RESUMING, _S.STOPPING, _S.STOPPED, _S.SAVING, _S.ERROR}),
    _S.RESUMING: frozenset({_S.RUNNING, _S.PAUSED, _S.STOPPING, _S.STOPPED, _S.ERROR}),
    _S.STOPPING: frozenset({_S.STOPPED, _S.ERROR}),
    _S.SAVING: frozenset({_S.STOPPED, _S.RUNNING, _S.PAUSED, _S.STOPPING, _S.ERROR}),
    _S.RESTORING: frozenset({_S.RUNNING, _S.STARTING, _S.STOPPING, _S.STOPPED, _S.ERROR}),
    _S.ERROR: frozenset({_S.RESUMING, _S.STOPPING, _S.STOPPED, _S.STARTING}),
}
"""The allowed next states of each state. Running → Starting is a guest that reboots itself; Error → Resuming is a
guest whose disk had no room left on the host."""


def may_follow(old: VMState, new: VMState) -> bool:
    """Return whether a machine may change from ``old`` to ``new``; staying is always allowed."""
    return new is old or new in TRANSITIONS[old]


class StateInfo(msgspec.Struct, frozen=True):
    """The state of the machine, and the operations it allows."""

    state: VMState
    can_pause: bool
    can_resume: bool
    can_stop: bool
    can_hard_stop: bool


_ALIVE = frozenset(VMState) - {_S.STOPPED}


def state_info(state: VMState) -> StateInfo:
    """Return ``state`` with the operations it allows."""
    return StateInfo(
        state=state,
        can_pause=state is _S.RUNNING,
        can_resume=state in {_S.PAUSED, _S.ERROR},
        can_stop=state in _ALIVE - {_S.STOPPING},
        can_hard_stop=state in _ALIVE,
    )
