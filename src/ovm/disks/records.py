"""What lies in ``target_dir``: of which version by versions.json, and with which content by digests.json.

versions.json alone says that a file is whole. digests.json takes its name together with the files it describes, while
versions.json knows none of them; so what it says of a file that versions.json knows is always about that very file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ovm.disks import plan
from ovm.paths import TargetPaths
from ovm.trust.files import read_file


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """A file as it was when it was made."""

    file: str
    """Its name in ``target_dir``."""
    version: str
    size: int
    digest: str
    """As :mod:`ovm.disks.digest` makes it, or ``sha256:`` and the one that was known."""


@dataclass(frozen=True, slots=True)
class Records:
    """Both records, by the files' names in ``versions``."""

    versions: dict[str, str]
    made: dict[str, Made]
    """Only of files that ``versions`` has, and in that version: what else digests.json says counts for nothing."""

    def names(self) -> dict[str, str]:
        """The files' names in ``target_dir``, as far as they are known."""
        return {name: made.file for name, made in self.made.items()}


def load(target: TargetPaths) -> Records:
    """What is recorded; nothing where it is missing or damaged."""
    versions = plan.recorded_versions(_content(target.versions))
    try:
        # not msgspec.json: a name need not be UTF-8
        made = msgspec.convert(json.loads(_content(target.digests)), dict[str, Made])
    except (ValueError, RecursionError):
        made = {}
    return Records(versions, {name: one for name, one in made.items() if one.version == versions.get(name)})


def encode(record: Mapping[str, str | Made]) -> bytes:
    """What is written into versions.json (as the seed writes it, to the letter) or into digests.json."""
    return json.dumps(msgspec.to_builtins(record), indent=2).encode()


def _content(path: Path) -> bytes:
    try:
        return read_file(path, plan.RECORD_MAX_BYTES)
    except OSError:
        return b""
