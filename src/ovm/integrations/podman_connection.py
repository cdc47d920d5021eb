"""A podman connection to a machine: ``podman --connection ovm``.

Where podman keeps its connections has changed with its versions, so podman itself is asked to add and to remove them;
it changes nothing else. A connection that leads to the machine's own socket is the machine's, any other is not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from ovm.errors import HelperError, StateError
from ovm.integrations.environment import podman_url
from ovm.integrations.labels import label
from ovm.process.child import users_environment

PODMAN_TIMEOUT_S = 30.0
"""podman waits for a lock of its own while it changes them."""
_LEADS_ELSEWHERE = ("CONTAINER_HOST", "CONTAINER_CONNECTION")
"""With these, podman would speak to another engine, or miss it."""


def add(name: str, socket: Path) -> str:
    """Make the connection of the machine ``name``, and say what is there then; nothing if this host has no podman.

    As podman does it: the first of all connections becomes the one ``podman --remote`` uses by default.

    Raises:
        StateError: there is a connection of that name which leads elsewhere.
        HelperError: podman could not do it.
    """
    if not shutil.which("podman"):
        return ""
    connection, uri = label(name), podman_url(socket)
    there = _connections().get(connection)
    if there is None:
        _podman("add", connection, uri)
    elif there != uri:
        raise StateError(
            f"there is a podman connection {connection} which leads elsewhere, to {there}",
            hint=f"if nobody needs it: podman system connection remove {connection}",
        )
    return f"podman connection {connection}"


def remove(name: str, socket: Path) -> str:
    """Remove the connection of the machine ``name`` and say what is gone; empty if there was none to ``socket``.

    Raises:
        HelperError: podman could not do it.
    """
    connection = label(name)
    if not shutil.which("podman") or _connections().get(connection) != podman_url(socket):
        return ""
    _podman("remove", connection)
    return f"podman connection {connection}"


def _connections() -> dict[str, str]:
    """Where each connection leads."""
    output = _podman("list", "--format", "json")
    try:
        return {known["Name"]: known["URI"] for known in json.loads(output or "[]") or []}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise HelperError(f"podman does not tell its connections: {output[:200]!r}") from error


def _podman(*argv: str) -> str:
    command = ["podman", "system", "connection", *argv]
    environment = {key: value for key, value in users_environment().items() if key not in _LEADS_ELSEWHERE}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            cwd=os.sep,
            timeout=PODMAN_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HelperError(f"`{' '.join(command)}` was not done within {PODMAN_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise HelperError(f"podman cannot be run: {error.strerror}") from error
    if done.returncode:
        raise HelperError(
            f"`{' '.join(command)}` failed",
            exit_reason=f"exit status {done.returncode}",
            log_tail=tuple(done.stderr.splitlines()[-5:]),
        )
    return done.stdout
