"""What is done after a run of a machine."""

from __future__ import annotations

import itertools

import pytest

from ovm.machine.outcome import RESTART_AGAIN_S, Ending, History, NextStep, Outcome, next_step

NOW = 1000.0
LONG_AGO = NOW - RESTART_AGAIN_S - 1
JUST_NOW = NOW - RESTART_AGAIN_S

HISTORIES = {
    "first": History(may_restart=True),
    "may not restart": History(may_restart=False),
    "kernel was retried": History(may_restart=True, kernel_was_retried=True),
    "restarted just now": History(may_restart=True, restarted_at=JUST_NOW),
    "restarted long ago": History(may_restart=True, restarted_at=LONG_AGO),
    "both long ago": History(may_restart=True, kernel_was_retried=True, restarted_at=LONG_AGO),
}
BUT_END = {
    **{(Ending.KERNEL_FELL, name): NextStep.RETRY_KERNEL for name in HISTORIES},
    **{(Ending.NOT_RESUMED, name): NextStep.BOOT_INSTEAD for name in HISTORIES},
    **{(Ending.NETWORK_LOST, name): NextStep.RESTART for name in HISTORIES},
    (Ending.KERNEL_FELL, "kernel was retried"): NextStep.END,
    (Ending.KERNEL_FELL, "both long ago"): NextStep.END,
    (Ending.NETWORK_LOST, "may not restart"): NextStep.END,
    (Ending.NETWORK_LOST, "restarted just now"): NextStep.END,
}
"""Every other ending is the machine's end, whatever was before."""


@pytest.mark.parametrize(("ending", "history"), list(itertools.product(Ending, HISTORIES)))
def test_what_is_done_next(ending, history):
    """A kernel is retried once, a restart waits out its minute, and what was stopped or failed is at its end."""
    outcome = Outcome(ending, at=NOW)
    assert next_step(outcome, HISTORIES[history]) is BUT_END.get((ending, history), NextStep.END)


@pytest.mark.parametrize(
    ("step", "after"),
    [
        (NextStep.END, History(may_restart=True)),
        (NextStep.BOOT_INSTEAD, History(may_restart=True)),
        (NextStep.RETRY_KERNEL, History(may_restart=True, kernel_was_retried=True)),
        (NextStep.RESTART, History(may_restart=True, restarted_at=NOW)),
    ],
)
def test_what_was_done_is_remembered(step, after):
    """The history has each step that may not be repeated at once."""
    assert History(may_restart=True).after(step, NOW) == after
