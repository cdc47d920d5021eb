"""The images released with this package: ``index.json``, empty in a source checkout, filled by a release."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Annotated

import msgspec

from ovm.errors import ImageError
from ovm.image.images import Arch, Digest, FormatNumber, Size, Word
from ovm.registry.images import image_hint

INDEX = "index.json"
INDEX_FORMAT = 1


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """An image that can be fetched."""

    url: Annotated[str, msgspec.Meta(pattern=r"\Ahttps?://[!-~]{1,2000}\Z")]
    sha256: Digest
    size: Size
    """Size of the release in bytes."""
    unpacked: Size
    """Bytes the image takes on disk."""
    version: Word
    """Version of the ovm it was released with."""


class _Index(msgspec.Struct, frozen=True):
    format: FormatNumber
    images: dict[Arch, Release]


def released_image(arch: Arch) -> Release:
    """Return the image for ``arch`` that was released with this package.

    Raises:
        ImageError: there is none.
    """
    index = read_index((resources.files("ovm.image") / INDEX).read_bytes())
    if arch not in index:
        raise ImageError(f"no image for {arch} was released with this copy of ovm", hint=image_hint())
    return index[arch]


def read_index(text: bytes) -> Mapping[Arch, Release]:
    """Parse an ``index.json``.

    Raises:
        ImageError: it has another format or is invalid.
    """
    try:
        index = msgspec.json.decode(text, type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"the index of images is invalid: {error}") from error
    if index.format != INDEX_FORMAT:
        raise ImageError(f"the index of images has format {index.format} instead of {INDEX_FORMAT}")
    return index.images


def write_index(images: Mapping[Arch, Release]) -> bytes:
    """Return the ``index.json`` of ``images``."""
    text = msgspec.json.encode(_Index(INDEX_FORMAT, dict(sorted(images.items()))))
    return msgspec.json.format(text, indent=2) + b"\n"
