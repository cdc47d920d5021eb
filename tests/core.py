"""The ovm-core test guest: one made to the contract of the images of the seed's time, out of the full guest's image.

Kernel and rootfs are the full guest's; the initrd has another ``/init`` and lays ``guest/core/tree`` over the rootfs.

- vda is the rootfs, vdb is formatted at every boot and holds what is written to the root, vdc is formatted only if it
  carries no btrfs and becomes /var/lib/containers. Without vdb or vdc the guest powers off.
- The initrd asks vsock port 1025 for a command, one ``recv()`` of 2048 bytes as far as the first NUL, and has ``sh`` do
  it while the root is at /mnt/overlay. It may append to etc/fstab there.
- The network is gvforwarder's over vsock port 1024. sshd lets in whom root's authorized_keys names. Podman listens at
  /run/podman/podman.sock, and with the word ``core.tcp`` on the kernel's command line on TCP port 58125 too.
- ``ready.service`` sources /opt/ready.command behind all of them. The guest's ``socat`` can do one thing,
  ``- VSOCK-CONNECT:2:PORT``.
"""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import doubles
import guests
import tiny
from ovm.guest import bootconfig
from tiny import Guest

SOURCES = Path(__file__).parent / "guest" / "core"
GVFORWARDER = "github.com/containers/gvisor-tap-vsock/cmd/vm@v0.8.9"

_UNITS = "tree/etc/systemd/system"
_STARTED = ("core-mounts.service", "gvforwarder.service", "podman-tcp.service", "ready.service")
_MASKED = ("ovm-attach.service", "ovm-podman.service", "ovm-podman.socket", "ovm-ready.service", "ovm-rosetta.service")


def build(image: Path, directory: Path) -> Guest:
    """The guest made from the full image in ``image``."""
    initrd = guests.made("core.initrd", of=image) or _initrd(image, directory)
    return Guest(kernel=image / "kernel", initrd=initrd, rootfs=image / "rootfs.btrfs")


def _initrd(image: Path, directory: Path) -> Path:
    files = {os.fspath(path.relative_to(SOURCES)): _file(path) for path in sorted(SOURCES.rglob("*")) if path.is_file()}
    vsock = _file(tiny.vsock(directory))
    files |= {"bin/vsock": vsock, "tree/usr/bin/socat": vsock}
    files["tree/usr/local/bin/gvforwarder"] = _file(_gvforwarder())
    links = {"tree/usr/bin/udhcpc": "busybox"}
    links |= {f"{_UNITS}/{unit}": "/dev/null" for unit in _MASKED}
    links |= {f"{_UNITS}/multi-user.target.wants/{unit}": f"../{unit}" for unit in _STARTED}
    files |= {name: (stat.S_IFLNK | 0o777, target.encode()) for name, target in links.items()}
    initrd = directory / "core.initrd"
    initrd.write_bytes(bootconfig._padded((image / "initrd").read_bytes()) + tiny.archive(files))
    return initrd


def _file(path: Path) -> tuple[int, bytes]:
    return path.stat().st_mode, path.read_bytes()


def _gvforwarder() -> Path:
    """The guest's end of gvproxy's network; built once."""
    directory = doubles.TOOLS / GVFORWARDER.rpartition("/")[2]
    program = directory / "vm"
    with doubles.locked():
        if not program.exists():
            environment = os.environ | {"CGO_ENABLED": "0", "GOBIN": os.fspath(directory), "GOFLAGS": "-trimpath"}
            go = doubles.go()
            argv = [go, "install", "-ldflags", "-s -w", GVFORWARDER]
            subprocess.run(argv, env=environment, check=True, timeout=doubles.BUILD_TIMEOUT_S)
    return program
