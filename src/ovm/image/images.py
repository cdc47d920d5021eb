"""A guest image on disk: a directory with a kernel, an initrd, a rootfs and the ``image.json`` that describes them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ovm.errors import ImageError
from ovm.registry import image_hint, read_manifest

FORMAT = 1
"""Of ``image.json``; goes up when an older ovm could not use what a newer one builds."""
DESCRIPTION = "image.json"
ZIPPED_ROOTFS = "rootfs.btrfs.zip"
FILE_NAMES = {"kernel": "kernel", "initrd": "initrd", "rootfs": "rootfs.btrfs"}
"""What an image is made of, and what the files are called."""

Arch = Literal["amd64", "arm64"]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class ImageFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file of an image."""

    sha256: _Digest
    size: Annotated[int, msgspec.Meta(gt=0)]
    data_bytes: int = 0
    """What it occupies on disk where it is sparse; 0 where it is not."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What ``image.json`` says."""

    format: int
    guest: str
    arch: Arch
    suite: str
    versions: dict[str, str]
    tree_sha256: _Digest
    """Over every path, mode, owner, time, link target and content of the rootfs: the same packages, the same digest."""
    packages: dict[str, str]
    files: dict[str, ImageFile]


class GuestImage(Description, frozen=True, kw_only=True):
    """A guest image that is there: described, and with every file at its right size."""

    directory: Path

    def path(self, name: str) -> Path:
        """Where the file ``kernel``, ``initrd`` or ``rootfs`` is."""
        return self.directory / FILE_NAMES[name]


def load_image(directory: Path) -> GuestImage:
    """Read an image's description and check that its files are there at their right sizes.

    Raises:
        ImageError: the directory holds no image, or one that is unknown or incomplete.
    """
    described = read_description(read_manifest(directory), os.fspath(directory / DESCRIPTION))
    image = GuestImage(directory=directory, **{name: getattr(described, name) for name in described.__struct_fields__})
    for name in FILE_NAMES:
        _check_size(image.path(name), image.files[name].size)
    return image


def read_description(text: bytes, where: str) -> Description:
    """What an ``image.json`` says; ``where`` it was read is for the message.

    Raises:
        ImageError: it is of another kind or cannot be understood.
    """
    try:
        form = msgspec.json.decode(text, type=_Format)
        if form.guest != "ovm" or form.format != FORMAT:
            raise ImageError(
                f"{where} is of a guest image of another kind ({form.guest}, format {form.format})", hint=image_hint()
            )
        described = msgspec.json.decode(text, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{where} cannot be understood: {error}", hint=image_hint()) from error
    for name in FILE_NAMES:
        if name not in described.files:
            raise ImageError(f"{where} does not mention the {name}", hint=image_hint())
    return described


class _Format(msgspec.Struct):
    """Read before the rest, which another format may name otherwise."""

    format: int
    guest: str


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageError(f"{path} is missing: {error.strerror}", hint=image_hint()) from error
    if size != expected:
        raise ImageError(f"{path} has {size} bytes instead of {expected}", hint=image_hint())


async def verify_image(directory: Path) -> GuestImage:
    """Recompute every digest of an image.

    Raises:
        ImageError: a file is not what was built; the message names it.
    """
    image = load_image(directory)
    for name, expected in image.files.items():
        if name in FILE_NAMES and await asyncio.to_thread(sha256, image.path(name)) != expected.sha256:
            raise ImageError(
                f"{image.path(name)} is damaged: its SHA-256 is not the one in {DESCRIPTION}", hint=image_hint()
            )
    return image


def list_images(root: Path) -> list[GuestImage]:
    """Every usable image below ``root``, by name. What is not one, or is damaged, is left out."""
    if not root.is_dir():
        return []
    images = []
    for directory in sorted(root.iterdir()):
        if directory.name.startswith("."):
            continue
        with contextlib.suppress(ImageError):
            images.append(load_image(directory))
    return images


def remove_image(directory: Path) -> None:
    """Remove an image's directory. Whether a machine still uses it is for the caller to know.

    Raises:
        ImageError: there is no image of ours in it, so it is left alone.
    """
    try:
        form = msgspec.json.decode(read_manifest(directory), type=_Format)
    except (ImageError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{directory} is not a guest image, so it was left alone") from error
    if form.guest != "ovm":
        raise ImageError(f"{directory} is a guest image of another kind ({form.guest}), so it was left alone")
    # the description first: what is left of an interrupted removal no longer looks like an image
    (directory / DESCRIPTION).unlink()
    shutil.rmtree(directory)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
