"""A docker context for a machine: ``docker --context ovm``.

docker keeps a context as a file, in a directory named by the digest of the context's name. ovm writes the file itself,
because compose, docker-py, testcontainers and editors read it without docker, too. The description names the machine;
a context without it is not ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ovm import paths
from ovm.errors import FileError, StateError
from ovm.integrations.labels import label
from ovm.trust.atomic import disk_errors, write_through
from ovm.trust.files import read_file

META_MAX_BYTES = 1 << 20
_NO_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
"""docker does not decode the path, but refuses one with an invalid escape."""


def add(name: str, socket: Path) -> str:
    """Create or update the context of the machine ``name``; returns its name as text.

    docker's default context stays the same.

    Raises:
        StateError: a context of that name exists and is not ours.
        FileError: the context cannot be read or written, or docker would refuse the path.
    """
    context = label(name)
    path = _path(context)
    if _NO_ESCAPE.search(str(socket)):
        raise FileError(
            f"docker cannot use the path {socket}: it contains a %", hint="set XDG_RUNTIME_DIR to another directory"
        )
    meta = {
        "Name": context,
        "Metadata": {"Description": _description(name)},
        "Endpoints": {"docker": {"Host": f"unix://{socket}", "SkipTLSVerify": False}},
    }
    there = _read(path)
    if there is not None and not _is_ours(there, name):
        raise StateError(
            f"the docker context {context} exists and is not of this machine",
            hint=f"remove it if it is not needed: docker context rm {context}",
        )
    if there != meta:
        _write(path, json.dumps(meta, separators=(",", ":")))
    return f"docker context {context}"


def remove(name: str) -> str:
    """Remove the context of the machine ``name``; returns its name as text, or an empty string if it was not ours.

    Raises:
        StateError: the context is removed, but is still docker's default.
        FileError: the context cannot be read or removed.
    """
    context = label(name)
    path = _path(context)
    there = _read(path)
    if there is None or not _is_ours(there, name):
        return ""
    try:
        path.unlink()
        with contextlib.suppress(OSError):  # another program's file is in it
            path.parent.rmdir()
    except OSError as error:
        raise FileError(f"the docker context {context} cannot be removed: {error}") from error
    if _current() == context:
        raise StateError(
            f"the docker context {context} is removed, but is still docker's default",
            hint="choose another: docker context use default",
        )
    return f"docker context {context}"


def _description(name: str) -> str:
    return f"ovm machine {name} in {paths.machine_dir(name)}"


def _is_ours(meta: dict[str, Any], name: str) -> bool:
    metadata = meta.get("Metadata")
    return isinstance(metadata, dict) and metadata.get("Description") == _description(name)


def _config_dir() -> Path:
    chosen = os.environ.get("DOCKER_CONFIG")
    return Path(chosen) if chosen else paths.user_home() / ".docker"


def _path(context: str) -> Path:
    return _config_dir() / "contexts" / "meta" / hashlib.sha256(context.encode()).hexdigest() / "meta.json"


def _current() -> str:
    """Return docker's default context."""
    try:
        told = (_read(_config_dir() / "config.json") or {}).get("currentContext")
    except FileError:
        return ""
    return told if isinstance(told, str) else ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        told = json.loads(read_file(path, META_MAX_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    if not isinstance(told, dict):
        raise FileError(f"{path} is not a JSON object")
    return told


def _write(path: Path, content: str) -> None:
    with disk_errors(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_through(path, content.encode(), 0o644)
