"""Guest images: build one from Debian packages, fetch one that was released, and look after those there are.

A program of its own: nothing that boots a machine imports it.
"""

from __future__ import annotations

from ovm.image.build import BuildOptions, Progress, build_image
from ovm.image.images import GuestImage, ImageFile, list_images, load_image, remove_image, verify_image
from ovm.image.pull import PullOptions, PullProgress, pull_image
from ovm.image.release import Packed, pack_image

__all__ = [
    "BuildOptions",
    "GuestImage",
    "ImageFile",
    "Packed",
    "Progress",
    "PullOptions",
    "PullProgress",
    "build_image",
    "list_images",
    "load_image",
    "pack_image",
    "pull_image",
    "remove_image",
    "verify_image",
]
