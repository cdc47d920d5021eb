"""Guest images on this host: their directories and manifests."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from ovm import hypervisors, paths
from ovm.errors import ImageError
from ovm.model import architectures
from ovm.trust.files import read_file

IMAGE_MANIFEST = "image.json"
IMAGE_GUESTS = ("ovm", "bare")
"""The kinds of guest in an image, as named in :class:`ovm.Options`."""
IMAGE_FORMAT = 1
MANIFEST_MAX_BYTES = 1 << 20
IMAGE_FILES = {"kernel": "kernel", "initrd": "initrd", "rootfs": "rootfs.btrfs"}
"""The parts of an image that a machine needs, and their files."""


_Word = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z")]


class _File(msgspec.Struct, frozen=True):
    size: Annotated[int, msgspec.Meta(gt=0, le=1 << 40)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class _Manifest(msgspec.Struct, frozen=True):
    """The fields of ``image.json`` that are read here."""

    format: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    guest: _Word
    arch: _Word
    files: dict[str, _File]


@dataclass(frozen=True, slots=True)
class Image:
    """A guest image as its ``image.json`` describes it. Its files exist and have the right sizes."""

    directory: Path
    guest: str
    """One of IMAGE_GUESTS."""
    arch: str
    sha256: dict[str, str]
    """Digests of the ``kernel``, the ``initrd`` and the ``rootfs``."""

    def path(self, role: str) -> Path:
        """Return the path of the ``kernel``, ``initrd`` or ``rootfs``."""
        return self.directory / IMAGE_FILES[role]

    def version(self, role: str) -> str:
        """Return a version of that file, which changes with its content."""
        return f"sha256:{self.sha256[role]}"


def image_dir(name: str) -> Path:
    """Return the directory of the image ``name``: one of this user's images, or a path if it contains ``/``."""
    return paths.expanded(name) if "/" in name else paths.images_dir() / name


def host_arch() -> str:
    """Return this host's architecture, as named by Debian and container images.

    Raises:
        UnsupportedError: ovm has no guest for it.
    """
    return architectures.of(hypervisors.host_arch()).debian


def default_image_dir(arch: str) -> Path:
    """Return the directory of the default guest image."""
    return paths.images_dir() / f"default-{arch}"


def load_image(directory: Path) -> Image:
    """Load the guest image in ``directory``.

    Raises:
        ImageError: it is missing, of an unknown kind, or a file of it is missing or truncated.
    """
    try:
        manifest = msgspec.json.decode(read_manifest(directory), type=_Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{directory / IMAGE_MANIFEST} cannot be read: {error}", hint=image_hint()) from error
    if manifest.guest not in IMAGE_GUESTS or manifest.format != IMAGE_FORMAT:
        raise ImageError(
            f"the image in {directory} is of an unknown kind: {manifest.guest}, format {manifest.format}",
            hint=image_hint(),
        )
    for role, name in IMAGE_FILES.items():
        if role not in manifest.files:
            raise ImageError(f"the image in {directory} lacks its {role}", hint=image_hint())
        _check_size(directory / name, manifest.files[role].size)
    sha256 = {role: manifest.files[role].sha256 for role in IMAGE_FILES}
    return Image(directory=directory, guest=manifest.guest, arch=manifest.arch, sha256=sha256)


def read_manifest(directory: Path) -> bytes:
    """Return the content of the ``image.json`` in ``directory``.

    Raises:
        ImageError: it is missing, unreadable or too long.
    """
    path = directory / IMAGE_MANIFEST
    try:
        return read_file(path, MANIFEST_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(f"there is no guest image in {directory}", hint=image_hint()) from error
    except (OSError, ValueError) as error:  # ValueError: the path is invalid
        raise ImageError(f"{path} cannot be read: {error}", hint=image_hint()) from error


def _check_size(path: Path, wanted: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageError(f"the image lacks {path}: {error.strerror}", hint=image_hint()) from error
    if size != wanted:
        raise ImageError(f"{path} has {size} bytes instead of {wanted}", hint=image_hint())


def image_hint() -> str:
    """Return a hint how to get a guest image on this host."""
    arch = host_arch()
    if is_released(arch):
        return "fetch it: ovm image pull"
    if sys.platform == "linux":
        return "build it: ovm image build"
    return (
        f"build it on Linux with `ovm image build --arch {arch}` and copy the directory to {default_image_dir(arch)}, "
        "or fetch a packed image: ovm image pull URL"
    )


def is_released(arch: str) -> bool:
    """Whether this version of ovm was released with an image for ``arch``."""
    from importlib import resources

    index = (resources.files("ovm") / "image" / "index.json").read_bytes()
    return arch in msgspec.json.decode(index, type=_Index).images


class _Index(msgspec.Struct):
    """The fields of the index of released images that are read here."""

    images: dict[str, msgspec.Raw]
