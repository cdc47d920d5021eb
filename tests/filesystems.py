"""File systems of a test's own, in a file."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MAKERS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


@contextlib.contextmanager
def mounted(kind: str, where: Path, *arguments: str, source: str = "") -> Iterator[Path]:
    """Mount a file system; skips the test where that cannot be."""
    if os.geteuid():
        pytest.skip("only root can mount a file system")
    where.mkdir(parents=True, exist_ok=True)
    mount = subprocess.run(
        ["mount", "-t", kind, *arguments, source or kind, where], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"this host cannot mount {kind}: {mount.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def make(kind: str, image: Path, size: int) -> Path:
    """A file with an empty file system in it."""
    with image.open("wb") as opened:
        opened.truncate(size)
    try:
        subprocess.run([*MAKERS[kind], image], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this host cannot make a {kind}: {error}")
    return image
