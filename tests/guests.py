"""What the tests' guests are made of and only Linux can make: ``guests.py DIR`` makes it, for ``$OVM_TEST_GUESTS``.

The image that they go with is ``$OVM_TEST_IMAGE``, or the one that is installed; it is to be the same wherever they
are used.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def made(name: str, *, of: Path | None = None) -> Path | None:
    """The file ``name`` that was made elsewhere, if any was; an initrd has to be ``of`` the image that is used."""
    chosen = os.environ.get("OVM_TEST_GUESTS")
    if not chosen:
        return None
    path = Path(chosen).absolute() / name
    if of is not None:
        begins = (of / "initrd").read_bytes()
        with path.open("rb") as file:
            assert file.read(len(begins)) == begins, f"{path} was made of another image than {of}"
    return path


def make(directory: Path) -> None:
    """All of them."""
    import core
    import full
    import tiny
    from ovm.registry import images as registry

    os.environ.pop("OVM_TEST_GUESTS", None)
    chosen = os.environ.get("OVM_TEST_IMAGE")
    image = Path(chosen).absolute() if chosen else registry.default_image_dir(registry.host_arch())
    directory.mkdir(parents=True, exist_ok=True)
    for build in (tiny.build, core.build):
        print(build(image, directory).initrd)
    print(full.busybox_tar(directory / "busybox.tar"))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
