"""A guest image on disk: a directory with a kernel, an initrd, a rootfs and the ``image.json`` that describes them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Annotated

import msgspec

from ovm.errors import ImageError
from ovm.model.architectures import DebianArch
from ovm.registry.images import image_hint, read_manifest

FORMAT = 1
"""Of ``image.json``; goes up when an older ovm could not use what a newer one builds."""
DESCRIPTION = "image.json"
ZIPPED_ROOTFS = "rootfs.btrfs.zip"
FILE_NAMES = {"kernel": "kernel", "initrd": "initrd", "rootfs": "rootfs.btrfs"}
"""What an image is made of, and what the files are called."""

SIZE_MAX_BYTES = 1 << 40
"""Of a file of an image. A sum of all its sizes is still far from what a file system or a JSON reader can count."""

Arch = DebianArch
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Size = Annotated[int, msgspec.Meta(gt=0, le=SIZE_MAX_BYTES)]
Word = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9.+:~_-]{0,127}\Z")]
"""The name or the version of a package, of a suite or of a file: fit to print, and no path."""
FormatNumber = Annotated[int, msgspec.Meta(ge=0, le=1000)]


class ImageFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file of an image."""

    sha256: Digest
    size: Size
    data_bytes: Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX_BYTES)] = 0
    """What it occupies on disk where it is sparse; 0 where it is not."""

    def __post_init__(self) -> None:
        if self.data_bytes > self.size:
            raise ValueError(f"data_bytes is {self.data_bytes}, more than the size of {self.size}")

    @property
    def occupied(self) -> int:
        """Bytes that it takes on disk."""
        return self.data_bytes or self.size


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What ``image.json`` says."""

    format: FormatNumber
    guest: Word
    arch: Arch
    suite: Word
    versions: dict[Word, Word]
    tree_sha256: Digest
    """Over every path, mode, owner, time, link target and content of the rootfs: the same packages, the same digest."""
    packages: dict[Word, Word]
    files: dict[Word, ImageFile]

    @property
    def occupied(self) -> int:
        """Bytes that the image takes on disk."""
        return sum(file.occupied for file in self.files.values())


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

    format: FormatNumber
    guest: Word


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
