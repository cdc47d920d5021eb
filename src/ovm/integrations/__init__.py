"""Registration of a machine with docker, podman and ssh. ovm changes only what it has created there.

These hooks are optional and need no running machine. If one fails, its error is returned and the others still run.
They block on files and programs: from a coroutine, call them in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ovm.errors import OVMError


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of the hooks."""

    done: tuple[str, ...]
    """What was created or removed, as text: ``docker context ovm``."""
    problems: tuple[OVMError, ...]
    """The errors of the hooks that failed."""


def add(name: str, socket: Path) -> Outcome:
    """Create the docker context and the podman connection for ``socket``, the podman socket of the machine ``name``.

    Without podman on this host the podman connection is skipped.
    """
    from ovm.integrations import docker_context, podman_connection

    return _each(lambda: docker_context.add(name, socket), lambda: podman_connection.add(name, socket))


def remove(name: str, socket: Path) -> Outcome:
    """Remove what :func:`add` created. Contexts and connections of others under these names stay."""
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
