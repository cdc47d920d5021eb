"""Another user of this host, who does what a test says. Becoming one takes root."""

from __future__ import annotations

import contextlib
import os
import pickle
import pwd
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

FIRST_UID = 64000
"""Debian gives such numbers to nobody by itself."""


def free_uid() -> int:
    """A user id that no account of this host has."""
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return next(uid for uid in range(FIRST_UID, FIRST_UID + 1000) if uid not in taken)


def _forked() -> int:
    """As ``os.fork``, which from Python 3.12 on warns of threads; the child uses none, and ends by ``os._exit``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


@dataclass(frozen=True)
class Stranger:
    """Somebody with no rights but those of everybody."""

    uid: int

    def does(self, action: Callable[..., T], *arguments: Any) -> T:
        """What ``action`` returns, done by a process of theirs; raises what it raises."""
        reading, writing = os.pipe()
        if (pid := _forked()) == 0:
            os.close(reading)
            self._become_and_tell(writing, action, arguments)
        os.close(writing)
        with os.fdopen(reading, "rb") as told:
            content = told.read()
        os.waitpid(pid, 0)
        done, result = pickle.loads(content)
        if not done:
            raise result
        return result

    @contextlib.contextmanager
    def doing(self, action: Callable[..., object], *arguments: Any) -> Iterator[int]:
        """While inside a process of theirs does ``action``, over and over if it returns; yields its pid."""
        if (pid := _forked()) == 0:
            try:
                self._become()
                while True:
                    with contextlib.suppress(OSError):
                        action(*arguments)
            finally:
                os._exit(1)
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _become(self) -> None:
        os.setgroups([])
        os.setresgid(self.uid, self.uid, self.uid)
        os.setresuid(self.uid, self.uid, self.uid)
        os.umask(0)

    def _become_and_tell(self, writing: int, action: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        try:
            try:
                self._become()
                told: tuple[bool, object] = (True, action(*arguments))
            except BaseException as error:  # noqa: BLE001 - it is raised again where it was asked for
                error.add_note(traceback.format_exc())
                told = (False, error)
            with os.fdopen(writing, "wb") as report:
                report.write(pickle.dumps(told))
        finally:
            os._exit(0)


def stranger() -> Stranger:
    """One whom this host does not know; skips where this process cannot become another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    return Stranger(free_uid())
