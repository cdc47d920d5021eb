"""What ``create_linux_ovm`` refuses before it touches anything, and which files it and ``reset_path`` replace."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

import ovm
import tiny
import under

pytestmark = pytest.mark.tiny


def cut_kernel(root: Path) -> dict[str, str]:
    (root / "vmlinux").write_bytes(b"\x7fELF" + bytes(2000))
    return {"kernel": str(root / "vmlinux")}


def cut_rootfs(root: Path) -> dict[str, str]:
    (root / "odd.btrfs").write_bytes(bytes(700))
    return {"rootfs": str(root / "odd.btrfs")}


def hostile_zip(root: Path) -> dict[str, str]:
    with zipfile.ZipFile(root / "rootfs.btrfs.zip", "w") as archive:
        archive.writestr("../../etc/cron.d/rootfs.btrfs", b"0" * 512)
        archive.writestr("rootfs.btrfs", b"0" * 512)
    return {"rootfs": str(root / "rootfs.btrfs.zip")}


def not_executable(root: Path) -> dict[str, str]:
    (root / "gvproxy").write_text("#!/bin/sh\n")
    return {"gvproxy": str(root / "gvproxy")}


def too_old(root: Path) -> dict[str, str]:
    (root / "gvproxy").write_text("#!/bin/sh\necho gvproxy version v0.7.3\n")
    (root / "gvproxy").chmod(0o755)
    return {"gvproxy": str(root / "gvproxy")}


def empty_initrd(root: Path) -> dict[str, str]:
    (root / "initrd").touch()
    return {"initrd": str(root / "initrd")}


ORIGINS = [
    (lambda root: {"kernel": str(root / "none")}, ovm.FileError, "kernel: .*none does not exist"),
    (lambda root: {"initrd": str(root)}, ovm.FileError, "is a directory"),
    (lambda root: {"rootfs": ""}, ovm.OptionError, "rootfs"),
    (lambda root: {"vmlinuz": "/x"}, ovm.OptionError, "vmlinuz"),
    (cut_kernel, ovm.FileError, "ELF"),
    (cut_rootfs, ovm.FileError, "512"),
    (hostile_zip, ovm.ArchiveError, "rootfs.btrfs.zip"),
    (empty_initrd, ovm.FileError, "initrd"),
    (not_executable, ovm.HelperError, "not executable"),
    (too_old, ovm.HelperError, r"0\.7\.3; 0\.8\.1 or newer"),
]


@pytest.mark.parametrize(("origin", "kind", "message"), ORIGINS)
async def test_a_wrong_origin_is_refused_before_anything_is_touched(
    machines: tiny.Machines, origin: Any, kind: type[Exception], message: str
) -> None:
    """A wrong origin file is refused before any file changes."""
    options = machines.options()
    options["origin_path"] |= origin(machines.root)
    await refused(machines, options, kind, message)


OPTIONS = [
    ({"memory_mib": 128}, ovm.OptionError, "memory_mib=128"),
    ({"memory_mib": "1 GiB"}, ovm.OptionError, "memory_mib='1 GiB'"),
    ({"cpus": 0}, ovm.OptionError, "cpus=0"),
    ({"cpus": True}, ovm.OptionError, "cpus=True"),
    ({"data_disk_mib": -1}, ovm.OptionError, "data_disk_mib=-1"),
    ({"guest": "windows"}, ovm.OptionError, "guest='windows'"),
    ({"accelerator": "fast"}, ovm.OptionError, "accelerator='fast'"),
    ({"hostname": "a b"}, ovm.OptionError, "hostname='a b'"),
    ({"kernel_cmdline": "a\nb"}, ovm.OptionError, "kernel_cmdline"),
    ({"environment": {"A B": "c"}}, ovm.OptionError, "environment: 'A B'"),
    ({"publish_address": "localhost"}, ovm.OptionError, "publish_address='localhost'"),
    ({"versions": {"gvproxy": "1"}}, ovm.OptionError, "Versions: kernel, initrd, rootfs must be given"),
    ({"versions": {"gvproxy": 1, "kernel": "1", "initrd": "1", "rootfs": "1"}}, ovm.OptionError, "gvproxy"),
    ({"mounts": [{"host_path": "relative", "guest_path": "/x"}]}, ovm.InputError, "mounts"),
    (
        {"mounts": [{"host_path": "/tmp", "guest_path": "/tmp"}]},
        ovm.OptionError,
        "a bare guest cannot mount host folders",
    ),
    ({"mounts": [{"host_path": "/tmp", "guest_path": "/etc"}]}, ovm.OptionError, "'/etc'"),
    ({"ca_certificates": ["/etc/hosts"]}, ovm.FileError, "not a PEM certificate"),
    ({"memory": 512}, ovm.OptionError, "memory"),
    ({"target_dir": None}, ovm.OptionError, "target_dir"),
    ({"log_dir": "/etc/hosts/log"}, ovm.FileError, "log_dir: /etc/hosts is not a directory"),
    ({"socket_dir": "/tmp/" + "x" * 100}, ovm.SocketPathError, "bytes long"),
]


@pytest.mark.parametrize(("option", "kind", "message"), OPTIONS, ids=lambda value: str(value)[:40])
async def test_a_wrong_option_is_refused_before_anything_is_touched(
    machines: tiny.Machines, option: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """A wrong option is refused before any file changes."""
    await refused(machines, machines.options() | option, kind, message)


QEMUS = [
    ({"accelerator": "hvf"}, ovm.UnsupportedError, "hvf does not exist"),
    ({"qemu": "/nonexistent/qemu"}, ovm.HelperError, "/nonexistent/qemu"),
    ({"qemu": "/bin/true"}, ovm.HelperError, "does not print its version"),
    ({"guest": "ovm-core"}, ovm.UnsupportedError, "vfkit"),
    ({"rosetta": True}, ovm.UnsupportedError, "rosetta"),
]


@under.QEMU_ALONE
@pytest.mark.parametrize(("option", "kind", "message"), QEMUS, ids=str)
async def test_what_qemu_cannot_is_refused(
    machines: tiny.Machines, option: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """Options that QEMU does not support are refused."""
    await refused(machines, machines.options() | option, kind, message)


VFKITS = [
    ({"accelerator": "kvm"}, ovm.UnsupportedError, "kvm does not exist"),
    ({"target_dir": "/tmp/ovm-never,made"}, ovm.FileError, "comma"),
    ({"log_dir": "/tmp/ovm-never,made"}, ovm.FileError, "comma"),
    ({"mounts": [{"host_path": "/tmp/,"}], "guest": "ovm"}, ovm.FileError, "comma"),
    ({"socket_dir": "/tmp/ovm never made"}, ovm.SocketPathError, "URL"),
    ({"socket_dir": "/tmp/ovm-never-made%20"}, ovm.SocketPathError, "URL"),
    ({"socket_dir": "/tmp/" + "x" * 80}, ovm.SocketPathError, "bytes long"),
]


@under.VFKIT_ALONE
@pytest.mark.parametrize(("option", "kind", "message"), VFKITS, ids=str)
async def test_what_vfkit_cannot_is_refused(
    machines: tiny.Machines, option: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """Options that vfkit does not support are refused."""
    await refused(machines, machines.options() | option, kind, message)


@under.VFKIT_ALONE
@pytest.mark.parametrize(("version", "message"), [("v0.6.1", "0.6.2 or newer"), ("0.5.1", "0.6.2 or newer")])
async def test_an_old_vfkit_is_refused(machines: tiny.Machines, version: str, message: str) -> None:
    """A vfkit that is older than the oldest supported one is refused."""
    old = machines.root / "vfkit"
    old.write_text(f"#!/bin/sh\necho vfkit version: {version}\n")
    old.chmod(0o755)
    options = machines.options()
    options["origin_path"]["vfkit"] = str(old)
    await refused(machines, options, ovm.HelperError, message)


async def refused(machines: tiny.Machines, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    before = sorted(machines.root.rglob("*"))
    with pytest.raises(kind, match=message) as caught:
        await under.create(options)
    assert isinstance(caught.value, ovm.InputError)
    assert isinstance(caught.value, ValueError)
    assert sorted(machines.root.rglob("*")) == before
    assert not [path for path in Path("/tmp").iterdir() if path.name.startswith(("xxx", "ovm-never", "ovm never"))]


def identities(m: tiny.Machine) -> dict[str, tuple[int, int]]:
    records = {"versions.json", "digests.json", "ovm.lock"}
    files = [path for path in m.ovm.options.target_dir.iterdir() if path.name not in records]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


NAMES = {"gvproxy": "gvproxy", "kernel": "kernel", "initrd": "tiny.initrd", "rootfs": "tiny.rootfs"}


@pytest.mark.parametrize("name", NAMES)
async def test_another_version_replaces_exactly_that_file(machines: tiny.Machines, name: str) -> None:
    """Another version of one file replaces that file and no other."""
    first = identities(await machines())
    assert set(first) - {"vfkit"} == {*NAMES.values(), "data.img", "machine.json"}
    assert identities(await machines()) == first
    versions = machines.options()["versions"] | {name: "2"}
    second = identities(await machines(versions=versions))
    assert {file for file in first if first[file] != second[file]} == {NAMES[name]}


async def test_reset_path_restores_the_files_and_keeps_the_data(machines: tiny.Machines) -> None:
    """reset_path() restores the files of the machine and keeps its data disk."""
    m = await machines()
    target = m.ovm.options.target_dir
    before = identities(m)
    for name in NAMES.values():
        os.truncate(target / name, 10)
    (target / "kernel").unlink()
    with (target / "data.img").open("r+b") as disk:
        disk.write(b"kept")

    await m.ovm.reset_path()
    assert (target / "tiny.rootfs").read_bytes() == machines.guest.rootfs.read_bytes()
    assert (target / "kernel").read_bytes() == machines.guest.kernel.read_bytes()
    assert (target / "data.img").read_bytes()[:4] == b"kept"
    after = identities(m)
    assert after["data.img"][0] == before["data.img"][0]
    async with m.ovm:
        with pytest.raises(ovm.StateError, match="cannot be restored"):
            await m.ovm.reset_path()

    await m.ovm.reset_path(data=True)
    assert (target / "data.img").read_bytes()[:4] == bytes(4)
    assert (target / "data.img").stat().st_size == 256 << 20
