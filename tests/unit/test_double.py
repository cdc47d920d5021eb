"""The double of vfkit says what vfkit says, as far as no machine is needed for it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import doubles

DEADLINE_S = 60

Double = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def double(short_path: Path) -> Double:
    """Runs a double of the test's own, with faults if any are ordered; its command line boots files that exist."""
    program = shutil.copy(doubles.vfkit(), short_path / "vfkit")
    kernel, initrd = short_path / "kernel", short_path / "initrd"
    kernel.write_bytes(bytes(0x38) + b"ARM\x64")
    initrd.write_bytes(b"initrd")
    boot = ["--kernel", kernel, "--initrd", initrd, "--kernel-cmdline", "quiet"]

    def run(*words: str | Path, booting: bool = True, **faults: object) -> subprocess.CompletedProcess[str]:
        if faults:
            (short_path / "double.json").write_text(json.dumps(faults))
        argv = [program, *(boot if booting else []), *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd=short_path)

    return run


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """What vfkit ended with: it says it with its usage, and once more as its last line."""
    assert done.returncode == 1
    said = done.stderr.rstrip("\n").splitlines()[-1]
    assert f"Error: {said}\n" in done.stderr
    return said


def test_its_version_is_vfkits(double):
    """The line that vfkit prints, or the one that is ordered."""
    assert double("--version", booting=False).stdout == "vfkit version: v0.6.4\n"
    assert double("--version", booting=False, version="0.5.1").stdout == "vfkit version: 0.5.1\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "virtio-lightbulb"], "unknown device type: virtio-lightbulb"),
        (["--device", "virtio-blk,path=/nowhere/disk"], "failed to open file /nowhere/disk: "),
        (["--device", "virtio-net"], "one of 'nat' or 'fd' or 'unixSocketPath' must be set"),
        (["--device", "virtio-fs,sharedDir=/a,b"], "unknown option for virtio-fs devices: b"),
        (["--device", "virtio-fs,sharedDir=/nowhere/folder"], "stat /nowhere/folder: no such file or directory"),
        (["--device", "virtio-net,nat"], "the double has no virtio-net nat"),
        (["--device", "virtio-gpu"], "the double has no *config.VirtioGPU"),
        (["--bootloader", "linux"], "if any flags in the group [initrd bootloader] are set"),
        (["--log-level", "loud"], "unknown log level: loud"),
        (["--restful-uri", "unix://host/path"], "invalid unix uri: host is forbidden"),
        (["--restful-uri", f"unix:///{'x' * 108}"], "invalid unix uri: socket path length exceeds macOS limits"),
        (["--nested"], "nested virtualization is not supported"),
        (["--lightbulb"], "unknown flag: --lightbulb"),
    ],
)
def test_what_vfkit_refuses(double, words, said):
    """Its words, on its standard error, twice."""
    assert error_of(double(*words)).startswith(said)


def test_a_disk_has_to_be_one(double, tmp_path):
    """The file's first bytes are looked at when the command line is read, its size when the machine is made."""
    disk = tmp_path / "disk"
    for content, said in [
        (b"", f"failed to read the header of file {disk}: EOF"),
        (b"QFI\xfb" + bytes(508), "vfkit does not support qcow2 image format"),
        (b"some", "Invalid disk image"),
    ]:
        disk.write_bytes(content)
        assert said in error_of(double("--device", f"virtio-blk,path={disk}"))


def test_a_network_that_nobody_listens_on_ends_it(double, short_path):
    """gvproxy has to be there first. vfkit leaves what it had bound by then."""
    assert "connect: no such file or directory" in error_of(
        double("--device", f"virtio-net,unixSocketPath={short_path}/net.sock")
    )
    assert len(list(short_path.glob("vfkit-*-*.sock"))) == 1


def test_its_end_of_the_network_has_to_fit_into_a_socket_address(double, tmp_path):
    """The limit is macOS's, also here."""
    directory = tmp_path / ("x" * 80)
    directory.mkdir()
    assert "is too long: " in error_of(double("--device", f"virtio-net,unixSocketPath={directory}/net.sock"))


def test_it_introduces_itself_to_the_network(double, short_path):
    """With four bytes from a socket beside the one it was given, which is gone when it is, unless that is ordered."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(os.fspath(short_path / "net.sock"))
        network = f"virtio-net,unixSocketPath={short_path}/net.sock"
        for faults, left in [({}, 0), ({"leave_net_socket": True}, 1)]:
            said = error_of(double("--device", network, "--device", "virtio-gpu", **faults))
            assert said == "the double has no *config.VirtioGPU"
            assert len(list(short_path.glob("vfkit-*.sock"))) == left
            hello, sender = listener.recvfrom(64)
            assert hello == b"VFKT"
            assert Path(sender).match(f"{short_path}/vfkit-*-*.sock")
        double("--device", f"{network},vfkitMagic=off", "--device", "virtio-gpu")
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(64)


def test_rosetta_is_not_to_be_had(double):
    """Not on these processors, and not without macOS."""
    assert error_of(double("--device", "rosetta,mountTag=r")) in {
        "rosetta is unsupported on non-arm64 platforms",
        "rosetta is not supported",
    }


def test_a_stale_rest_socket_is_fatal(double, short_path):
    """vfkit does not remove what a killed one left."""
    (short_path / "rest.sock").touch()
    done = double("--restful-uri", f"unix://{short_path}/rest.sock")
    assert done.returncode == 1
    assert f"listen unix {short_path}/rest.sock: bind: address already in use" in done.stderr


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="there is no QEMU to refuse it")
def test_what_does_not_boot_does_not_start(double):
    """The error is the framework's; QEMU's own words are before it."""
    said = error_of(double("--device", "virtio-rng"))
    assert "VZErrorDomain Code=1" in said
    assert "The virtual machine failed to start." in said


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="there is no QEMU to start")
def test_the_sockets_of_a_killed_one_are_swept(double, short_path, monkeypatch):
    """By the next; those of one that lives are not, and its own are gone with it."""
    monkeypatch.setenv("TMPDIR", os.fspath(short_path))
    dead, alive = short_path / f"vfkit-double-{2**22 + 1}-1", short_path / f"vfkit-double-{os.getpid()}-1"
    for directory in (dead, alive):
        directory.mkdir()
    error_of(double("--device", "virtio-rng"))
    assert list(short_path.glob("vfkit-double-*")) == [alive]


def test_the_pid_file_stays(double, short_path):
    """It is written before the devices are looked at, for its owner alone, and nobody removes it."""
    error_of(double("--pidfile", short_path / "pid", "--device", "virtio-lightbulb"))
    assert int((short_path / "pid").read_text()) > 0
    assert stat.S_IMODE((short_path / "pid").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "faults",
    [
        {"ignore_stopp": True},
        {"die_at": "never"},
        {"die_with": "SIGHUP"},
        {"lose_answer": ["Start"]},
        {"refuse": {"pause": "no"}},
        {"ignore_stop": "yes"},
    ],
)
def test_a_misspelt_fault_is_refused(double, faults):
    """With a status that nothing else has, before anything else is done."""
    done = double("--version", **faults)
    assert done.returncode == 2
    assert done.stderr.startswith("double.json: ")
    assert done.stdout == ""


@pytest.mark.parametrize(("how", "status"), [(7, 7), ("SIGKILL", -9), ("SIGSEGV", -11), (None, 1)])
def test_it_dies_as_ordered(double, how, status):
    """With a status or by a signal; silently, as things that die do."""
    done = double("--device", "virtio-rng", die_at="arguments", **({} if how is None else {"die_with": how}))
    assert done.returncode == status
    assert "Error" not in done.stderr
    assert "Adding" not in done.stderr


@pytest.fixture
def understood() -> Iterator[Callable[..., list[dict]]]:
    """What vfkit makes of command lines."""

    def ask(*lines: list[str]) -> list[dict]:
        argv = [doubles.oracle()]
        done = subprocess.run(argv, input=json.dumps(lines), capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return ask


def test_the_oracle_tells_what_vfkit_reads(understood, tmp_path):
    """Each line by itself; the devices in their order, with all that is known of them."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(512))
    boot = ["--kernel", "/k", "--initrd", "/i i", "--kernel-cmdline", 'a="b,c" d']
    devices = [f"virtio-blk,path={disk},readonly", "virtio-vsock,port=1026,socketURL=/s.sock,listen", "virtio-rng"]
    whole, bare, wrong = understood(
        [*boot, "--cpus", "3", "--memory", "700", "--restful-uri", "unix:///r%20s"]
        + [word for device in devices for word in ("--device", device)],
        [],
        [*boot, "--device", "virtio-fs,sharedDir=/a,b"],
    )
    assert (whole["cpus"], whole["memory_mib"]) == (3, 700)
    assert whole["bootloader"] == {"kernel": "/k", "initrd": "/i i", "cmdline": 'a="b,c" d'}
    assert whole["rest"] == {"scheme": "unix", "host": "", "path": "/r s"}
    assert [device["kind"] for device in whole["devices"]] == ["virtio-blk", "virtio-vsock", "virtio-rng"]
    assert whole["devices"][0].items() >= {"ImagePath": str(disk), "ReadOnly": True}.items()
    assert whole["devices"][1] == {"kind": "virtio-vsock", "Port": 1026, "SocketURL": "/s.sock", "Listen": True}
    assert bare == {"error": "empty option list in --bootloader command line argument"}
    assert wrong == {"error": "unknown option for virtio-fs devices: b"}
