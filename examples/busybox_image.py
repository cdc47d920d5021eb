"""A container image made on the spot from this host's busybox, so that trying ovm needs no registry."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

BUSYBOX = Path("/bin/busybox")  # Debian's busybox-static
APPLETS = ("sh", "echo", "uname", "cat", "ls", "wget", "httpd", "sleep")


def busybox_image() -> bytes:
    """The tar archive of its whole file system; `import` makes an image of it."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        program = tarfile.TarInfo("bin/busybox")
        program.mode, program.size = 0o755, BUSYBOX.stat().st_size
        with BUSYBOX.open("rb") as content:
            tar.addfile(program, content)
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return archive.getvalue()
