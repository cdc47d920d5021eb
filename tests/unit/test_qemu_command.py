"""QEMU's command line, exactly."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from ovm.hypervisors import Channel, Disk, Share, VMSpec
from ovm.hypervisors.accel import Emulator
from ovm.hypervisors.qemu import command, escape

SPEC = VMSpec(
    arch="x86_64",
    cpus=2,
    memory_mib=1024,
    kernel=Path("/t/kernel"),
    initrd=Path("/s/boot.initrd"),
    cmdline="quiet",
    disks=(Disk(name="ovm-rootfs", path=Path("/t/rootfs.btrfs"), read_only=True), Disk(name="d", path=Path("/t/d"))),
    shares=(),
    channels=(Channel(name="ovm.ready", vsock_port=1026, socket=Path("/s/ready.sock")),),
    network_socket=Path("/s/net.sock"),
    mac="5a:94:ef:e4:0c:ee",
    console_log=Path("/l/console.log"),
    control_socket=Path("/s/control.sock"),
)
SHARES = (
    Share(tag="share0", host_path=Path("/a"), read_only=False, socket=Path("/s/virtiofs-0.sock")),
    Share(tag="share1", host_path=Path("/b"), read_only=True, socket=Path("/s/virtiofs-1.sock")),
)


def argv_of(accelerator="tcg", *, version=(7, 2), **changes) -> list[str]:
    spec = dataclasses.replace(SPEC, **changes)
    emulator = Emulator(program=Path("/usr/bin/qemu"), version=version, arch=spec.arch)
    return command(spec, emulator, accelerator, qmp_fd=9)


def after(argv: list[str], option: str) -> list[str]:
    """The values of every ``option``, in order."""
    return [value for name, value in pairwise(argv) if name == option]


def block(name: str, path: str, *, read_only: bool) -> str:
    file = {"driver": "file", "filename": path}
    return json.dumps({"driver": "raw", "node-name": name, "read-only": read_only, "discard": "unmap", "file": file})


def test_the_whole_command_line():
    """For a plain machine the command line is this, word for word."""
    assert argv_of("kvm") == [
        "/usr/bin/qemu",
        *("-nodefaults", "-no-user-config"),
        *("-display", "none"),
        *("-machine", "q35,smm=off,sata=off,usb=off,graphics=off"),
        *("-accel", "kvm"),
        *("-cpu", "host"),
        *("-smp", "2"),
        *("-m", "1024"),
        *("-kernel", "/t/kernel"),
        *("-initrd", "/s/boot.initrd"),
        *("-append", "console=ttyS0 quiet"),
        *("-chardev", "socket,id=qmp,fd=9"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", "file,id=console,path=/l/console.log,append=on"),
        *("-serial", "chardev:console"),
        *("-device", "virtio-rng-pci"),
        *("-netdev", "stream,id=wire,server=off,addr.type=unix,addr.path=/s/net.sock"),
        *("-netdev", "hubport,id=plug,hubid=0,netdev=wire"),
        *("-netdev", "hubport,id=card,hubid=0"),
        *("-device", "virtio-net-pci,netdev=card,mac=5a:94:ef:e4:0c:ee,romfile="),
        *("-device", "virtio-serial-pci"),
        *("-chardev", "socket,id=channel0,server=off,path=/s/ready.sock"),
        *("-device", "virtserialport,chardev=channel0,name=ovm.ready"),
        *("-blockdev", block("ovm-rootfs", "/t/rootfs.btrfs", read_only=True)),
        *("-device", "virtio-blk-pci,drive=ovm-rootfs,serial=ovm-rootfs"),
        *("-blockdev", block("d", "/t/d", read_only=False)),
        *("-device", "virtio-blk-pci,drive=d,serial=d"),
    ]


def test_emulation_of_an_old_qemu():
    """Under tcg the accelerator's flags for this very QEMU are used."""
    argv = argv_of("tcg", version=(7, 2))
    assert after(argv, "-accel") == ["tcg,thread=multi"]
    assert after(argv, "-cpu") == ["max,-erms,-fsrm,-cx16"]


def test_shares_are_mounted_by_tag_and_share_the_memory():
    """With shared folders the guest's memory is one that virtiofsd can map, and each share has its device."""
    argv = argv_of(shares=SHARES)
    assert after(argv, "-machine") == ["q35,smm=off,sata=off,usb=off,graphics=off,memory-backend=memory"]
    assert after(argv, "-object") == ["memory-backend-memfd,id=memory,size=1024M,share=on"]
    assert after(argv, "-chardev")[-2:] == [
        "socket,id=share0,path=/s/virtiofs-0.sock",
        "socket,id=share1,path=/s/virtiofs-1.sock",
    ]
    assert after(argv, "-device")[-2:] == [
        "vhost-user-fs-pci,chardev=share0,tag=share0",
        "vhost-user-fs-pci,chardev=share1,tag=share1",
    ]


def test_without_shares_the_memory_is_private():
    """A machine without shared folders has no shared memory."""
    assert after(argv_of(), "-object") == []


def test_arm64_is_another_machine():
    """arm64 guests run on ``virt`` with the same devices and their own serial console."""
    argv = argv_of(arch="aarch64", shares=SHARES)
    assert after(argv, "-machine") == ["virt,gic-version=max,memory-backend=memory"]
    assert after(argv, "-append") == ["console=ttyAMA0 quiet"]
    assert after(argv, "-device") == after(argv_of(shares=SHARES), "-device")


def test_commas_in_paths_survive():
    """A comma in a path is doubled where QEMU splits at commas, and left alone where it does not."""
    argv = argv_of(
        kernel=Path("/a,b/kernel"),
        console_log=Path("/a,b/log"),
        network_socket=Path("/a,b/net"),
        channels=(Channel(name="c", vsock_port=1, socket=Path("/a,b/ready")),),
        disks=(Disk(name="d", path=Path('/a,b/"d"')),),
    )
    assert after(argv, "-kernel") == ["/a,b/kernel"]
    assert "file,id=console,path=/a,,b/log,append=on" in argv
    assert after(argv, "-netdev")[0].endswith("addr.path=/a,,b/net")
    assert "socket,id=channel0,server=off,path=/a,,b/ready" in argv
    assert json.loads(after(argv, "-blockdev")[0])["file"]["filename"] == '/a,b/"d"'


@pytest.mark.parametrize(("value", "escaped"), [("a", "a"), ("a,b", "a,,b"), (",,", ",,,,"), (Path("/x,"), "/x,,")])
def test_escape(value, escaped):
    """Each comma is written twice."""
    assert escape(value) == escaped


def test_a_read_only_disk_is_one_to_qemu():
    """The read-only root is attached so that no guest can write it, whatever it does."""
    disks = {d["node-name"]: d["read-only"] for d in map(json.loads, after(argv_of(), "-blockdev"))}
    assert disks == {"ovm-rootfs": True, "d": False}


def test_no_cmdline_of_ours_leaves_the_console():
    """Without a command line of ours the kernel still gets its console, and no stray blank."""
    assert after(argv_of(cmdline=""), "-append") == ["console=ttyS0"]


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no qemu-system-x86_64 on this machine")
def test_a_real_qemu_takes_our_options(short_path):
    """The real QEMU understands the whole command line, makes every device, and ends when told to."""
    for name in ("kernel", "initrd", "rootfs", "data,disk"):
        (short_path / name).write_bytes(bytes(512))
    spec = dataclasses.replace(
        SPEC,
        memory_mib=256,
        kernel=short_path / "kernel",
        initrd=short_path / "initrd",
        disks=(
            Disk(name="ovm-rootfs", path=short_path / "rootfs", read_only=True),
            Disk(name="ovm-data", path=short_path / "data,disk"),
        ),
        channels=(),
        network_socket=short_path / "net,work.sock",
        console_log=short_path / "con,sole.log",
    )
    emulator = Emulator(program=Path("qemu-system-x86_64"), version=(7, 2), arch="x86_64")
    argv = command(spec, emulator, "tcg", qmp_fd=0)
    argv[argv.index("socket,id=qmp,fd=0")] = "stdio,id=qmp"
    for option in ("-kernel", "-initrd", "-append"):  # these files are none
        at = argv.index(option)
        del argv[at : at + 2]
    asked = '{"execute": "qmp_capabilities"} {"execute": "query-block"} {"execute": "quit"}'
    with socket.socket(socket.AF_UNIX) as network:
        network.bind(str(spec.network_socket))
        network.listen()
        done = subprocess.run([*argv, "-S"], input=asked, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    assert '"ovm-rootfs"' in done.stdout
    assert f"{short_path}/data,disk" in done.stdout
    assert spec.console_log.exists()
