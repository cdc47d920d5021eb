"""How a machine is chosen, which only reads, and installed, which is what writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovm.errors import (
    ArchiveError,
    FileError,
    HelperError,
    InputError,
    OptionError,
    SocketPathError,
    UnsupportedError,
    UntrustedError,
)
from ovm.hypervisors import host_arch
from ovm.machine import prepare
from ovm.model.options import Options

DIRECTORIES = ("target_dir", "socket_dir", "log_dir", "ssh_key_dir")
KERNELS = {
    "x86_64": b"MZ" + bytes(0x200) + b"HdrS" + bytes(1024),
    "aarch64": b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(1024),
}
VERSIONS = {
    "gvproxy": "gvproxy version v0.8.9",
    "qemu": "QEMU emulator version 9.0.0",
    "virtiofsd": "virtiofsd 1.13.0",
    "vfkit": "vfkit version: v0.6.3",
}


def btrfs(size: int = 0x11000) -> bytes:
    image = bytearray(size)
    image[0x10040:0x10048] = b"_BHRfS_M"
    return bytes(image)


class Host:
    """Origins, helpers and directories of a machine that nobody could object to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.origins = root / "origins"
        self.machine = root / "machine"
        self.origins.mkdir()
        for name, version in VERSIONS.items():
            self.program(name, version)
        contents = {"kernel": KERNELS[host_arch()], "initrd": b"070701", "rootfs": btrfs()}
        for name, content in contents.items():
            (self.origins / name).write_bytes(content)

    def program(self, name: str, version: str) -> Path:
        """A program that prints ``version``, whatever it is asked."""
        path = self.origins / name
        path.write_text(f"#!/bin/sh\necho '{version}'\n")
        path.chmod(0o755)
        return path

    def file(self, name: str, content: bytes) -> Path:
        path = self.origins / name
        path.write_bytes(content)
        return path

    def given(self) -> dict[str, Any]:
        origins = {name: self.origins / name for name in ("gvproxy", "kernel", "initrd", "rootfs", "vfkit")}
        return {
            "origin_path": origins,
            "versions": dict.fromkeys(origins, "1"),
            **{name: self.machine / name for name in DIRECTORIES},
            "qemu": self.origins / "qemu",
            "virtiofsd": self.origins / "virtiofsd",
            "accelerator": "auto",
            "mounts": (),
            "data_disk_mib": 1024,
        }

    def tree(self) -> dict[str, tuple[int, int, int, bytes]]:
        """All there is below the machine's directories: inode, mode, time of the last change, and content."""
        found = {}
        for path in (self.machine, *self.machine.rglob("*")):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            found[str(path)] = (status.st_ino, status.st_mode, status.st_mtime_ns, content)
        return found


@pytest.fixture
def host(short_path: Path, monkeypatch) -> Host:
    """A host whose machine was made before: each of its directories holds a file."""
    host = Host(short_path)
    for name in DIRECTORIES:
        directory = host.machine / name
        directory.mkdir(parents=True, mode=0o755)
        (directory / "earlier").write_text("of an earlier run\n")
    monkeypatch.setattr(prepare.accel, "_kvm_obstacle", lambda: "there is no /dev/kvm")
    return host


def origin(**paths: Callable[[Host], Path]) -> Callable[[Host], dict[str, Any]]:
    return lambda host: {"origin_path": host.given()["origin_path"] | {n: path(host) for n, path in paths.items()}}


def option(**more: Any) -> Callable[[Host], dict[str, Any]]:
    return lambda _host: more


def a_directory_others_can_change(host: Host) -> dict[str, Any]:
    opened = host.root / "open"
    opened.mkdir()
    opened.chmod(0o777)
    return {"log_dir": opened / "log"}


BOTH = [
    ("no kernel", origin(kernel=lambda h: h.origins / "none"), FileError, "does not exist"),
    ("not a kernel", origin(kernel=lambda h: h.file("k", bytes(2000))), FileError, "not a Linux kernel"),
    ("an initrd that is a directory", origin(initrd=lambda h: h.origins), FileError, "is a directory"),
    ("not an initrd", origin(initrd=lambda h: h.file("i", b"none")), FileError, "not an initrd"),
    ("not btrfs", origin(rootfs=lambda h: h.file("r", bytes(1024))), FileError, "not a btrfs file system"),
    ("a cut rootfs", origin(rootfs=lambda h: h.file("r", btrfs()[:-1])), FileError, "not a multiple of 512"),
    ("a damaged archive", origin(rootfs=lambda h: h.file("r.zip", b"PK")), ArchiveError, "r.zip"),
    ("a reserved name", origin(initrd=lambda h: h.file("data.img", b"070701")), FileError, "is a reserved file name"),
    ("one name twice", origin(initrd=lambda h: h.file("KERNEL", b"070701")), FileError, "would both become"),
    ("no program", origin(gvproxy=lambda h: h.file("g", b"#!")), HelperError, "not executable"),
    ("an old gvproxy", origin(gvproxy=lambda h: h.program("g", "gvproxy version v0.7.3")), HelperError, "0.8.1 or"),
    ("a file for a directory", option(log_dir="/etc/hosts/log"), FileError, "is not a directory"),
    ("a directory others can change", a_directory_others_can_change, UntrustedError, "open"),
    ("a long socket path", option(socket_dir="/tmp/" + "x" * 100), SocketPathError, "bytes long"),
    ("a mount that is no folder", option(mounts=[{"host_path": "/etc/hosts"}]), FileError, "is not a directory"),
    ("a certificate that is none", option(ca_certificates=["/etc/hosts"]), FileError, "not a PEM certificate"),
    ("no certificate", option(ca_certificates=["/nonexistent.pem"]), FileError, "cannot be read"),
    ("a bare guest's folder", option(guest="bare", mounts=[{"host_path": "/tmp"}]), OptionError, "cannot mount"),
    ("a bare guest's dns", option(guest="bare", dns=["192.0.2.1"]), OptionError, "does not support dns"),
]  # fmt: skip
QEMU = [
    ("a guest of the seed's time", option(guest="ovm-core"), UnsupportedError, "require vfkit"),
    ("rosetta", option(rosetta=True), UnsupportedError, "requires vfkit"),
    ("no qemu", option(qemu="/nonexistent/qemu"), HelperError, "/nonexistent/qemu"),
    ("an old qemu", lambda h: {"qemu": h.program("q", "QEMU emulator version 7.1.0")}, HelperError, "7.2 or newer"),
    (
        "an old virtiofsd",
        lambda h: {"virtiofsd": h.program("v", "virtiofsd 0.9"), "mounts": [{"host_path": "/tmp"}]},
        HelperError,
        "1.0 or newer",
    ),
    ("no kvm", option(accelerator="kvm"), UnsupportedError, "no /dev/kvm"),
    ("hvf", option(accelerator="hvf"), UnsupportedError, "does not exist on this system"),
    ("no ssh agent", option(ssh_agent=True), InputError, "agent"),
]
VFKIT = [
    ("an environment", option(guest="ovm-core", environment={"A": "b"}), OptionError, "guest does not support"),
    ("an agent", option(guest="ovm-core", ssh_agent=True), OptionError, "ssh_agent"),
    ("kvm", option(accelerator="kvm"), UnsupportedError, "does not exist on macOS"),
    ("a comma", option(log_dir="/tmp/never,made"), FileError, "comma"),
    ("a space", option(socket_dir="/tmp/never made"), SocketPathError, "URL"),
    ("no vfkit", origin(vfkit=lambda h: h.origins / "none"), HelperError, "vfkit"),
    ("an old vfkit", origin(vfkit=lambda h: h.program("v", "vfkit version: v0.6.1")), HelperError, "0.6.2 or newer"),
]  # fmt: skip
BAD = [
    pytest.param(hypervisor, *row, id=f"{hypervisor}: {what}")
    for hypervisor, table in (("qemu", BOTH + QEMU), ("vfkit", BOTH + VFKIT))
    for what, *row in table
]


@pytest.mark.parametrize(("hypervisor", "bad", "kind", "words"), BAD)
async def test_a_bad_input_is_refused_before_anything_is_touched(host, monkeypatch, hypervisor, bad, kind, words):
    """choose() raises for each kind of bad input, and what is in the machine's directories stays byte for byte."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    options = Options.of(host.given() | bad(host))
    before = host.tree()
    with pytest.raises(kind, match=words) as caught:
        await prepare.choose(options, hypervisor)
    assert isinstance(caught.value, InputError)
    assert host.tree() == before


@pytest.mark.parametrize("hypervisor", ["qemu", "vfkit"])
@pytest.mark.parametrize("there", [True, False], ids=["directories there", "no directories"])
async def test_choosing_changes_nothing(host, hypervisor, there):
    """choose() alone makes, changes and removes nothing, where all is well and whether or not the directories exist."""
    given = host.given()
    if not there:
        given |= {name: host.machine / "new" / name for name in DIRECTORIES}
    before = host.tree()
    plan = await prepare.choose(Options.of(given), hypervisor)
    assert plan.options.target_dir == given["target_dir"]
    assert host.tree() == before


@pytest.mark.parametrize("hypervisor", ["qemu", "vfkit"])
async def test_a_plan_can_be_installed(host, hypervisor):
    """install() puts the files of a plan, keys and a data disk in place, and returns the driver that was chosen."""
    plan = await prepare.choose(Options.of(host.given()), hypervisor)
    prepared = await prepare.install(plan)
    assert prepared.driver.name == hypervisor
    assert prepared.files.kernel.read_bytes() == KERNELS[host_arch()]
    assert (host.machine / "target_dir" / "data.img").stat().st_size == 1 << 30
    assert (host.machine / "ssh_key_dir" / "ovm").exists()
