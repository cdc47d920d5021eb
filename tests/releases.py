"""Images, their releases, and what is left of a pull: the words in which its tests are written."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path

import pytest

from ovm.errors import ImageError
from ovm.image import PullOptions, pull, pull_image
from ovm.image import download as downloading
from ovm.image.index import Release
from ovm.image.release import Packed
from webserver import Web

MIB = 1024 * 1024
SOON_S = 30.0
FILES = {"kernel": "kernel", "initrd": "initrd", "rootfs": "rootfs.btrfs"}


def make_image(directory: Path, *, rootfs: bytes = b"", **changes: object) -> Path:
    """A small image as the builder describes it."""
    directory.mkdir(parents=True)
    rootfs = rootfs or os.urandom(3 * MIB) + bytes(MIB)
    contents = {"kernel": b"kernel" * 999, "initrd": os.urandom(5000), "rootfs": rootfs}
    for name, content in contents.items():
        (directory / FILES[name]).write_bytes(content)
    (directory / "manifest").write_text("every file")
    description = {
        "format": 1,
        "guest": "ovm",
        "arch": "amd64",
        "suite": "trixie",
        "versions": {"podman": "5.4.2"},
        "tree_sha256": sha256(b"every file"),
        "packages": {"podman": "5.4.2"},
        "files": {name: {"sha256": sha256(content), "size": len(content)} for name, content in contents.items()},
    } | changes
    (directory / "image.json").write_text(json.dumps(description))
    return directory


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


async def fetch(url: str, target: Path, sha256: str = "", progress: pull.PullProgress | None = None) -> None:
    async with asyncio.timeout(SOON_S):
        await pull_image(PullOptions(url=url, arch="amd64", output=target, sha256=sha256), progress=progress)


def version(target: Path) -> str:
    return str(json.loads((target / "image.json").read_bytes())["versions"]["podman"])


def beside(target: Path) -> list[str]:
    """What is there but the image."""
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def kept(target: Path) -> list[str]:
    """What an interrupted pull leaves."""
    return sorted(path.name for path in (target.parent / f".{target.name}.pulling").iterdir())


def refusing(web: Web) -> pull.PullProgress:
    """From the first byte on the server is out of order."""

    def progress(_stage: str, _done: int, _total: int) -> None:
        web.statuses = [503] * (downloading.ATTEMPTS - 1)

    return progress


INTERRUPTED = ["download", "download.json", "ovm.lock"]


async def interrupted(web: Web, target: Path, sha256: str = "") -> None:
    """A pull that fails for good after the first 2 MiB."""
    web.cuts = [2 * MIB]
    with pytest.raises(ImageError, match="503") as caught:
        await fetch(web.url(), target, sha256, refusing(web))
    assert "pull again" in caught.value.hint
    assert kept(target) == INTERRUPTED
    assert version(target) == "old"
    web.requests.clear()


def entry(packed: Packed, url: str, **changes: object) -> Release:
    known = {"sha256": packed.sha256, "size": packed.size, "unpacked": packed.unpacked, "version": "1"}
    return Release(url=url, **known | changes)  # type: ignore[arg-type]
