"""Records of the files in ``target_dir``: versions.json holds their versions, digests.json their digests.

Only an entry in versions.json means that a file is complete. digests.json is renamed together with the files that it
describes, while versions.json has no entry for them. So its entry for a file in versions.json always describes that
file.
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
    """A file as it was installed."""

    file: str
    """Its name in ``target_dir``."""
    version: str
    size: int
    digest: str
    """Digest from :mod:`ovm.disks.digest`, or ``sha256:`` and a known SHA-256."""


@dataclass(frozen=True, slots=True)
class Records:
    """Both records, by the file's key in ``versions``."""

    versions: dict[str, str]
    made: dict[str, Made]
    """Entries of digests.json whose version matches ``versions``; others are ignored."""

    def names(self) -> dict[str, str]:
        """Return the known names of the files in ``target_dir``."""
        return {name: made.file for name, made in self.made.items()}


def load(target: TargetPaths) -> Records:
    """Load both records; a missing or damaged one is empty."""
    versions = plan.recorded_versions(_content(target.versions))
    try:
        # not msgspec.json: a name need not be UTF-8
        made = msgspec.convert(json.loads(_content(target.digests)), dict[str, Made])
    except (ValueError, RecursionError):
        made = {}
    return Records(versions, {name: one for name, one in made.items() if one.version == versions.get(name)})


def encode(record: Mapping[str, str | Made]) -> bytes:
    """Encode versions.json (byte for byte as the seed does) or digests.json."""
    return json.dumps(msgspec.to_builtins(record), indent=2).encode()


def _content(path: Path) -> bytes:
    try:
        return read_file(path, plan.RECORD_MAX_BYTES)
    except OSError:
        return b""
