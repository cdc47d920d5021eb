"""Kernel locks of open files."""

from __future__ import annotations

import os
import threading

from ovm.trust.locks import lock_within, open_lock, try_lock, unlock


def test_a_lock_is_shared_or_exclusive(tmp_path):
    """Shared locks go together, an exclusive one excludes both kinds, and whoever inherits the file holds it too."""
    one, other = (open_lock(tmp_path / "lock") for _ in range(2))
    assert try_lock(one, shared=True)
    assert try_lock(other, shared=True)
    assert not try_lock(other)
    unlock(one)
    assert try_lock(other)
    inherited = os.dup(other)
    os.close(other)
    assert not try_lock(one, shared=True)
    os.close(inherited)
    assert try_lock(one, shared=True)
    os.close(one)


def test_another_holder_is_waited_for_until_the_deadline(tmp_path):
    """lock_within() returns as soon as the lock is free, and gives up at its deadline."""
    ours, theirs = (open_lock(tmp_path / "lock") for _ in range(2))
    assert try_lock(theirs, shared=True)
    assert not lock_within(ours, 0.03)
    threading.Timer(0.03, os.close, [theirs]).start()
    assert lock_within(ours, 10)
    os.close(ours)
