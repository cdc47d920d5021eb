"""A docker context for a machine: ``docker --context ovm``.

docker keeps a context as a file, in a directory called by the digest of the context's name. It is written here without
docker, because others read it too: compose, docker-py, testcontainers, editors. Its description says which machine it
was made for; a context without that is somebody else's.
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
"""docker decodes no path, but refuses one that could not be decoded."""


def add(name: str, socket: Path) -> str:
    """Make or renew the context of the machine ``name``, and say what is there then.

    Which context docker uses by default is left as it is.

    Raises:
        StateError: there is a context of that name which is not ours.
        FileError: it cannot be read or written, or docker takes no such path.
    """
    context = label(name)
    path = _path(context)
    if _NO_ESCAPE.search(str(socket)):
        raise FileError(
            f"docker cannot be told of {socket}: it has a % in it", hint="set XDG_RUNTIME_DIR to another directory"
        )
    meta = {
        "Name": context,
        "Metadata": {"Description": _description(name)},
        "Endpoints": {"docker": {"Host": f"unix://{socket}", "SkipTLSVerify": False}},
    }
    there = _read(path)
    if there is not None and not _is_ours(there, name):
        raise StateError(
            f"there is a docker context {context} which was not made for this machine",
            hint=f"if nobody needs it: docker context rm {context}",
        )
    if there != meta:
        _write(path, json.dumps(meta, separators=(",", ":")))
    return f"docker context {context}"


def remove(name: str) -> str:
    """Remove the context of the machine ``name`` and say what is gone; empty if there was none of ours.

    Raises:
        StateError: it is gone, but is the one docker uses by default.
        FileError: it cannot be read or removed.
    """
    context = label(name)
    path = _path(context)
    there = _read(path)
    if there is None or not _is_ours(there, name):
        return ""
    try:
        path.unlink()
        with contextlib.suppress(OSError):  # somebody else's file is in it
            path.parent.rmdir()
    except OSError as error:
        raise FileError(f"the docker context {context} cannot be removed: {error}") from error
    if _current() == context:
        raise StateError(
            f"the docker context {context} is removed, and docker still uses it by default",
            hint="docker context use default",
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
    """The context that docker uses unless it is told another."""
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
        raise FileError(f"{path} holds no object")
    return told


def _write(path: Path, content: str) -> None:
    with disk_errors(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_through(path, content.encode(), 0o644)
