"""Write the package's index of released images.

    .venv/bin/python scripts/image_index.py BASE_URL RELEASE.zip… [--index FILE]

BASE_URL is where the releases, which `ovm image pack` made, will be found by their names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ovm._version import __version__
from ovm.image.index import INDEX, Release, write_index
from ovm.image.release import inspect_release

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Read each release and write what is to be known of it."""
    parser = argparse.ArgumentParser(description="Write the package's index of released images.")
    parser.add_argument("base_url")
    parser.add_argument("releases", nargs="+", type=Path)
    parser.add_argument("--index", type=Path, default=ROOT / "src" / "ovm" / "image" / INDEX)
    chosen = parser.parse_args()
    images = {}
    for path in chosen.releases:
        packed = inspect_release(path)
        images[packed.arch] = Release(
            url=f"{chosen.base_url.rstrip('/')}/{path.name}",
            sha256=packed.sha256,
            size=packed.size,
            unpacked=packed.unpacked,
            version=__version__,
        )
        print(f"{packed.arch}: {images[packed.arch].url} {packed.sha256}")
    chosen.index.write_bytes(write_index(images))


if __name__ == "__main__":
    main()
