"""The images that the suites pull, made of a static busybox under the names that the suites use."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

BUSYBOX = Path("/bin/busybox")
GREETING = "Hello from Docker!"
MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DEBIAN_TO_OCI = {"x86_64": "amd64", "aarch64": "arm64"}
_ETC = {
    "etc/passwd": "".join(
        f"{name}:x:{ids}:{name}:/:/bin/sh\n"
        for name, ids in (("root", "0:0"), ("operator", "11:0"), ("postgres", "70:70"), ("nobody", "99:99"))
    ),
    "etc/group": "root:x:0:root\noperator:x:11:\npostgres:x:70:\nnobody:x:99:\n",
    "etc/os-release": 'ID=alpine\nNAME="Alpine Linux"\nVERSION_ID=3.10.0\n',
}
_DIRECTORIES = (
    "bin",
    "dev",
    "etc",
    "home",
    "mnt",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "var",
    "var/opt",
)


@dataclass(frozen=True)
class Image:
    """One image: its name at the registry, its tags, and what it runs."""

    repository: str
    tags: tuple[str, ...] = ("latest",)
    command: tuple[str, ...] = ("/bin/sh",)
    labels: Mapping[str, str] = field(default_factory=dict)


IMAGES = (
    Image("library/alpine", ("latest", "3.10", "3.3")),
    Image("library/busybox"),
    Image("library/hello-world", ("latest", "linux"), ("/bin/echo", GREETING)),
    Image("library/ubi8"),
    Image("libpod/alpine"),
    Image("libpod/alpine_labels", labels={"PODMAN": "/usr/bin/podman run -it IMAGE", "Env": "test"}),
    Image("libpod/busybox"),
)
"""The first part of a name is left to the registry: docker.io and quay.io are both served from here."""


@dataclass(frozen=True)
class Blob:
    """What a registry keeps under its digest."""

    content: bytes

    @property
    def digest(self) -> str:
        """As registries write it."""
        return f"sha256:{hashlib.sha256(self.content).hexdigest()}"

    def described(self, media_type: str) -> dict[str, str | int]:
        """As a manifest refers to it."""
        return {"mediaType": media_type, "size": len(self.content), "digest": self.digest}


def root_file_system() -> bytes:
    """A tar of busybox with all its applets, and the few files that the suites look at."""
    out = io.BytesIO()
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in _DIRECTORIES:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(entry)
        program = BUSYBOX.read_bytes()
        entry = tarfile.TarInfo("bin/busybox")
        entry.size, entry.mode = len(program), 0o755
        tar.addfile(entry, io.BytesIO(program))
        for directory in ("bin", "usr/bin"):  # some tests name the whole path
            for applet in applets:
                if applet != "busybox":
                    entry = tarfile.TarInfo(f"{directory}/{applet}")
                    entry.type, entry.linkname = tarfile.SYMTYPE, "/bin/busybox"
                    tar.addfile(entry)
        for name, text in _ETC.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


def packed(image: Image, root: bytes, layer: Blob, machine: str) -> tuple[Blob, Blob]:
    """The configuration and the manifest of an image with that one layer."""
    config = {
        "architecture": DEBIAN_TO_OCI.get(machine, machine),
        "os": "linux",
        "created": "2020-01-01T00:00:00Z",
        "config": {
            "Cmd": list(image.command),
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Labels": dict(image.labels) or None,
        },
        "rootfs": {"type": "layers", "diff_ids": [Blob(root).digest]},
        "history": [{"created": "2020-01-01T00:00:00Z", "created_by": image.repository}],
    }
    configured = Blob(json.dumps(config).encode())
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": configured.described(CONFIG_TYPE),
        "layers": [layer.described(LAYER_TYPE)],
    }
    return configured, Blob(json.dumps(manifest).encode())


def compressed(root: bytes) -> Blob:
    """A layer, the same for the same content."""
    return Blob(gzip.compress(root, mtime=0))
