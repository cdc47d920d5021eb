"""A podman connection to a machine: ``podman --connection ovm``.

podman's versions keep connections in different files, so ovm runs podman to add and remove them. A connection is the
machine's if it has the URL of the machine's socket.
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
"""podman may wait for its own lock while it changes connections."""
_LEADS_ELSEWHERE = ("CONTAINER_HOST", "CONTAINER_CONNECTION")
"""Variables that would make podman use another engine."""


def add(name: str, socket: Path) -> str:
    """Create the connection of the machine ``name``; returns its name as text, or an empty string without podman.

    podman makes the first connection the default of ``podman --remote``.

    Raises:
        StateError: a connection of that name exists with another URL.
        HelperError: podman failed.
    """
    if not shutil.which("podman"):
        return ""
    connection, uri = label(name), podman_url(socket)
    there = _connections().get(connection)
    if there is None:
        _podman("add", connection, uri)
    elif there != uri:
        raise StateError(
            f"the podman connection {connection} exists with another URL: {there}",
            hint=f"remove it if it is not needed: podman system connection remove {connection}",
        )
    return f"podman connection {connection}"


def remove(name: str, socket: Path) -> str:
    """Remove the connection of the machine ``name``; returns its name as text, or an empty string if it was not ours.

    Raises:
        HelperError: podman failed.
    """
    connection = label(name)
    if not shutil.which("podman") or _connections().get(connection) != podman_url(socket):
        return ""
    _podman("remove", connection)
    return f"podman connection {connection}"


def _connections() -> dict[str, str]:
    """Return the connections and their URLs."""
    output = _podman("list", "--format", "json")
    try:
        return {known["Name"]: known["URI"] for known in json.loads(output or "[]") or []}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise HelperError(f"podman's list of connections is invalid: {output[:200]!r}") from error


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
        raise HelperError(f"`{' '.join(command)}` did not end within {PODMAN_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise HelperError(f"podman cannot be run: {error.strerror}") from error
    if done.returncode:
        raise HelperError(
            f"`{' '.join(command)}` failed",
            exit_reason=f"exit status {done.returncode}",
            log_tail=tuple(done.stderr.splitlines()[-5:]),
        )
    return done.stdout
