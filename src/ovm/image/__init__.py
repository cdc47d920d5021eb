"""Guest images: build one from Debian packages, pull a released one, list, verify, pack and remove them.

No code that boots a machine imports this package.
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
