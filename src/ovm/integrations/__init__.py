"""What other programs are told of a machine: docker, podman, ssh. What ovm did not make there it does not touch.

Nothing here needs a running machine, or is needed for one: a hook that fails is told of, and the others are set.
All of it is short and waits for files and programs: from a coroutine, call it in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ovm.errors import OVMError


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of telling others."""

    done: tuple[str, ...]
    """What is there, or gone, in words: ``docker context ovm``."""
    problems: tuple[OVMError, ...]
    """Why something is not."""


def add(name: str, socket: Path) -> Outcome:
    """Make the docker context and the podman connection that lead to ``socket``, podman's in the machine ``name``.

    Without podman on this host there is nothing to tell it, which is no problem.
    """
    from ovm.integrations import docker_context, podman_connection

    return _each(lambda: docker_context.add(name, socket), lambda: podman_connection.add(name, socket))


def remove(name: str, socket: Path) -> Outcome:
    """Take back what :func:`add` made; what another made under these names stays."""
    from ovm.integrations import docker_context, podman_connection

    return _each(lambda: docker_context.remove(name), lambda: podman_connection.remove(name, socket))


def _each(*actions: Callable[[], str]) -> Outcome:
    done, problems = [], []
    for action in actions:
        try:
            if what := action():
                done.append(what)
        except OVMError as error:
            problems.append(error)
    return Outcome(tuple(done), tuple(problems))
