"""A guest image on disk: a directory with a kernel, an initrd, a rootfs, and ``image.json``, which describes them."""

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
"""Format of ``image.json``; incremented when an older ovm cannot use a newer image."""
DESCRIPTION = "image.json"
ZIPPED_ROOTFS = "rootfs.btrfs.zip"
FILE_NAMES = {"kernel": "kernel", "initrd": "initrd", "rootfs": "rootfs.btrfs"}
"""The parts of an image and their file names."""

SIZE_MAX_BYTES = 1 << 40
"""Size limit of an image's file. The sum of all sizes stays far below the limits of file systems and JSON readers."""

Arch = DebianArch
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Size = Annotated[int, msgspec.Meta(gt=0, le=SIZE_MAX_BYTES)]
Word = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9.+:~_-]{0,127}\Z")]
"""The name or version of a package, suite or file: printable, and not a path."""
FormatNumber = Annotated[int, msgspec.Meta(ge=0, le=1000)]


class ImageFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file of an image."""

    sha256: Digest
    size: Size
    data_bytes: Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX_BYTES)] = 0
    """Bytes on disk if it is sparse, else 0."""

    def __post_init__(self) -> None:
        if self.data_bytes > self.size:
            raise ValueError(f"data_bytes is {self.data_bytes}, more than the size of {self.size}")

    @property
    def occupied(self) -> int:
        """Bytes it takes on disk."""
        return self.data_bytes or self.size


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``image.json``."""

    format: FormatNumber
    guest: Word
    arch: Arch
    suite: Word
    versions: dict[Word, Word]
    tree_sha256: Digest
    """Digest of all paths, modes, owners, times, link targets and contents of the rootfs; equal for equal packages."""
    packages: dict[Word, Word]
    files: dict[Word, ImageFile]

    @property
    def occupied(self) -> int:
        """Bytes the image takes on disk."""
        return sum(file.occupied for file in self.files.values())


class GuestImage(Description, frozen=True, kw_only=True):
    """A guest image on disk: its description, with every file's size checked."""

    directory: Path

    def path(self, name: str) -> Path:
        """Return the path of the ``kernel``, ``initrd`` or ``rootfs``."""
        return self.directory / FILE_NAMES[name]


def load_image(directory: Path) -> GuestImage:
    """Read an image's description and check that its files exist and have the right sizes.

    Raises:
        ImageError: the directory contains no image, or one of an unknown kind, or an incomplete one.
    """
    described = read_description(read_manifest(directory), os.fspath(directory / DESCRIPTION))
    image = GuestImage(directory=directory, **{name: getattr(described, name) for name in described.__struct_fields__})
    for name in FILE_NAMES:
        _check_size(image.path(name), image.files[name].size)
    return image


def read_description(text: bytes, where: str) -> Description:
    """Parse an ``image.json``; ``where`` names it in error messages.

    Raises:
        ImageError: it is of another kind or invalid.
    """
    try:
        form = msgspec.json.decode(text, type=_Format)
        if form.guest != "ovm" or form.format != FORMAT:
            raise ImageError(
                f"{where} describes another kind of guest image ({form.guest}, format {form.format})", hint=image_hint()
            )
        described = msgspec.json.decode(text, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{where} is invalid: {error}", hint=image_hint()) from error
    for name in FILE_NAMES:
        if name not in described.files:
            raise ImageError(f"{where} does not list the {name}", hint=image_hint())
    return described


class _Format(msgspec.Struct):
    """Decoded before the rest, which may differ in another format."""

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
    """Recompute and check every digest of an image.

    Raises:
        ImageError: a file has changed since the build; the message names it.
    """
    image = load_image(directory)
    for name, expected in image.files.items():
        if name in FILE_NAMES and await asyncio.to_thread(sha256, image.path(name)) != expected.sha256:
            raise ImageError(
                f"{image.path(name)} is damaged: its SHA-256 is not the one in {DESCRIPTION}", hint=image_hint()
            )
    return image


def list_images(root: Path) -> list[GuestImage]:
    """List the usable images below ``root`` by name; skip damaged images and other files."""
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
    """Remove an image's directory. The caller must know that no machine uses it.

    Raises:
        ImageError: it contains no image of ovm, so it is left alone.
    """
    try:
        form = msgspec.json.decode(read_manifest(directory), type=_Format)
    except (ImageError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{directory} is not a guest image, so it was left alone") from error
    if form.guest != "ovm":
        raise ImageError(f"{directory} is another kind of guest image ({form.guest}), so it was left alone")
    # the description first: the rest of an interrupted removal no longer looks like an image
    (directory / DESCRIPTION).unlink()
    shutil.rmtree(directory)


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
