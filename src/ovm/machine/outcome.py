"""The outcome of a run of a machine, and the next step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum, auto

RESTART_AGAIN_S = 60.0
"""If the network is lost again within this time of a restart, the machine is not restarted."""


class Ending(Enum):
    """Why a run ended."""

    STOPPED = auto()
    """A stop was requested, or the start was cancelled."""
    POWERED_OFF = auto()
    """The guest powered itself off."""
    FAILED = auto()
    KERNEL_FELL = auto()
    """The guest's kernel crashed or hung before its first message."""
    NOT_RESUMED = auto()
    """The guest could not be resumed from its saved state; it can boot."""
    NETWORK_LOST = auto()
    """gvproxy died and could not be replaced."""


class NextStep(Enum):
    """The step after a run."""

    END = auto()
    RETRY_KERNEL = auto()
    """Boot again, as part of the same start."""
    BOOT_INSTEAD = auto()
    """Boot a guest that could not be resumed, as part of the same start."""
    RESTART = auto()
    """Begin a new start, because the network was lost."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a run."""

    ending: Ending
    at: float
    """Time on the monotonic clock."""
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class History:
    """The steps after earlier runs, since the user's start."""

    may_restart: bool
    """Whether the options allow a restart after the network was lost."""
    kernel_was_retried: bool = False
    restarted_at: float = -math.inf

    def after(self, step: NextStep, at: float) -> History:
        """Return the history with ``step`` taken at ``at``."""
        match step:
            case NextStep.RETRY_KERNEL:
                return replace(self, kernel_was_retried=True)
            case NextStep.RESTART:
                return replace(self, restarted_at=at)
            case _:
                return self


def next_step(outcome: Outcome, history: History) -> NextStep:
    """Decide the step after a run."""
    match outcome.ending:
        case Ending.KERNEL_FELL if not history.kernel_was_retried:
            return NextStep.RETRY_KERNEL
        case Ending.NOT_RESUMED:
            return NextStep.BOOT_INSTEAD
        case Ending.NETWORK_LOST if history.may_restart and outcome.at - history.restarted_at > RESTART_AGAIN_S:
            return NextStep.RESTART
        case _:
            return NextStep.END
