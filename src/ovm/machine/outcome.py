"""How a run of a machine ended, and what is done next."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum, auto

RESTART_AGAIN_S = 60.0
"""A machine whose network is lost again so soon after a restart is not restarted once more."""


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
    """What is done after a run."""

    END = auto()
    RETRY_KERNEL = auto()
    """Boot again, as part of the same start."""
    BOOT_INSTEAD = auto()
    """Boot what could not be resumed, as part of the same start."""
    RESTART = auto()
    """Begin a start of its own, because the network was lost."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    ending: Ending
    at: float
    """When, on the monotonic clock."""
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class History:
    """What was done after earlier runs, since the user's start."""

    may_restart: bool
    """Whether the options allow a restart after the network was lost."""
    kernel_was_retried: bool = False
    restarted_at: float = -math.inf

    def after(self, step: NextStep, at: float) -> History:
        """Return the history with ``step``, done at ``at``."""
        match step:
            case NextStep.RETRY_KERNEL:
                return replace(self, kernel_was_retried=True)
            case NextStep.RESTART:
                return replace(self, restarted_at=at)
            case _:
                return self


def next_step(outcome: Outcome, history: History) -> NextStep:
    """Decide what is done after a run."""
    match outcome.ending:
        case Ending.KERNEL_FELL if not history.kernel_was_retried:
            return NextStep.RETRY_KERNEL
        case Ending.NOT_RESUMED:
            return NextStep.BOOT_INSTEAD
        case Ending.NETWORK_LOST if history.may_restart and outcome.at - history.restarted_at > RESTART_AGAIN_S:
            return NextStep.RESTART
        case _:
            return NextStep.END
