"""``ovm doctor``: what is missing is said, with how to get it."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path

import pytest

from ovm import cli, paths
from ovm.cli import doctor
from ovm.cli.doctor import Check
from ovm.host import programs
from ovm.hypervisors import macos
from ovm.hypervisors.macos import MacHost


@pytest.fixture
def bare_host(tmp_path: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without any helper or builder; what a test puts into the returned directory is on PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    monkeypatch.setattr(doctor, "_SBIN", ())
    for table in ("_GVPROXY_DIRS", "_QEMU_DIRS", "_VFKIT_DIRS", "_VIRTIOFSD_DIRS"):
        monkeypatch.setattr(programs, table, ())
    return directory


def examine(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *args])
    return int(ended.value.code or 0), capsys.readouterr().out


@pytest.mark.usefixtures("bare_host")
def test_bare_host_lacks_what_is_required(capsys):
    """On a bare host the status is 1, and each missing thing has a hint."""
    status, out = examine(capsys, "--json")
    report = json.loads(out)
    assert status == 1
    assert report["ok"] is False
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["QEMU"]["status"] == checks["gvproxy"]["status"] == checks["image builder"]["status"] == "missing"
    assert checks["virtiofsd"]["status"] == checks["guest image"]["status"] == "warn"
    assert "apt install mmdebstrap btrfs-progs xz-utils" in checks["image builder"]["hint"]
    assert all(check["hint"] for check in report["checks"] if check["status"] != "ok")


def test_nothing_required_missing_is_success(capsys, bare_host, tmp_path):
    """With helpers and an image the status is 0, though the builder's programs are missing."""
    for name, said in (("gvproxy", "gvproxy version v0.8.9"), ("qemu-system-x86_64", "QEMU emulator version 9.0")):
        (bare_host / name).write_text(f"#!/bin/sh\necho {said}\n")
        (bare_host / name).chmod(0o755)
    (bare_host / "qemu-system-aarch64").symlink_to("qemu-system-x86_64")
    for arch in ("amd64", "arm64"):
        put_small_image(tmp_path / "home" / "images" / f"default-{arch}", arch)
    status, out = examine(capsys)
    assert status == 0, out
    assert "missing " not in out
    assert "accelerator" in out
    assert "gvproxy (0.8.9)" in out


def test_table_shows_hints_below_what_lacks_something():
    """The table has one line for each check, and a second one where something is to be done."""
    lines = doctor.table([Check("a", "ok", "fine", "unused"), Check("bcd", "missing", "gone", "get it")])
    assert [f"{status}{line}".split() for status, line in lines] == [
        ["ok", "a", "fine"],
        ["missing", "bcd", "gone"],
        ["→", "get", "it"],
    ]


def put_small_image(directory: Path, arch: str) -> None:
    directory.mkdir(parents=True)
    for name in ("kernel", "initrd", "rootfs.btrfs"):
        (directory / name).write_bytes(b"x")
    files = {role: {"size": 1, "sha256": "0" * 64} for role in ("kernel", "initrd", "rootfs")}
    (directory / "image.json").write_text(json.dumps({"format": 1, "guest": "ovm", "arch": arch, "files": files}))


def test_directory_open_to_others_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory for sockets that others can enter is a warning, with the command that closes it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("OVM_HOME", raising=False)
    directory = tmp_path / "ovm" / "default"
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    assert doctor.check_socket_dir("linux") == Check(
        "socket paths", "warn", f"{directory} is open to others (755)", f"chmod 700 {directory}"
    )
    directory.chmod(0o700)
    assert doctor.check_socket_dir("linux").status == "ok"


def test_long_socket_directory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a socket's path would not fit no machine starts, so it is missing, not a warning."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    assert doctor.check_socket_dir("linux").status == "missing"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_home_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where nothing can be written nothing can be made."""
    tmp_path.chmod(0o500)
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "home"))
    assert doctor.check_home().status == "missing"


def test_other_systems_are_told():
    """Where machines do not run that is the first thing to know."""
    assert doctor.check_platform("win32").status == "missing"
    assert doctor.check_platform("linux").status == "ok"


# --- a Mac


def put_program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare_mac(bare_host: Path, monkeypatch: pytest.MonkeyPatch):
    """A Mac without any helper; its directory for sockets is short."""
    monkeypatch.setattr(macos, "this_host", lambda: MacHost("arm64", (15, 1)))
    with tempfile.TemporaryDirectory(prefix="ovm-", dir="/tmp") as run:
        monkeypatch.setenv("XDG_RUNTIME_DIR", run)
        yield bare_host


@pytest.fixture
def mac(bare_mac: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mac with all that is needed; its tools print what the files of their names with ``.says`` hold."""
    for name, says in (("xattr", "No such xattr: com.apple.quarantine"), ("codesign", ENTITLED)):
        (tmp_path / f"{name}.says").write_text(says)
        put_program(tmp_path / name, f"exec /bin/cat {tmp_path}/{name}.says")
    tools = {"codesign": tmp_path / "codesign", "xattr": tmp_path / "xattr"}
    monkeypatch.setattr(macos, "check_program", functools.partial(macos.check_program, **tools))
    monkeypatch.setattr(macos, "_is_script", lambda path: False)  # the programs here are nothing else
    put_program(bare_mac / "vfkit", "echo vfkit version: v0.6.4")
    put_program(bare_mac / "gvproxy", "echo gvproxy version v0.8.9")
    for arch in ("amd64", "arm64"):
        put_small_image(tmp_path / "home" / "images" / f"default-{arch}", arch)
    return bare_mac


ENTITLED = "<plist><dict><key>com.apple.security.virtualization</key><true/></dict></plist>"


async def examine_mac() -> dict[str, Check]:
    return {check.name: check for check in await doctor.examine("darwin")}


async def test_a_mac_is_asked_for_what_a_mac_needs(mac):
    """Neither QEMU nor what builds images, and everything that is there is fine."""
    checks = await examine_mac()
    assert list(checks) == [
        "python", "system", "vfkit", "gvproxy", "guest image", "disk space", "socket paths", "data directory"
    ]  # fmt: skip
    assert checks["system"].detail == "macOS, version 15.1, Apple chip"
    assert checks["vfkit"].detail == f"{mac / 'vfkit'} (0.6.4)"
    assert {check.status for check in checks.values()} - {"warn"} == {"ok"}  # this disk may be full


async def test_linux_is_asked_for_what_linux_needs(bare_host):
    names = [check.name for check in await doctor.examine("linux")]
    assert names[1:7] == ["system", "QEMU", "accelerator", "gvproxy", "virtiofsd", "guest image"]
    assert "image builder" in names
    assert "vfkit" not in names


async def test_what_a_mac_would_not_run_is_missing(mac, tmp_path):
    """An entitlement, and a quarantine, with what undoes them."""
    (tmp_path / "codesign.says").write_text("Executable=vfkit")
    checks = await examine_mac()
    assert checks["vfkit"].status == "missing"
    assert "run a machine; Executable=vfkit" in checks["vfkit"].detail
    assert checks["gvproxy"].status == "ok"
    (tmp_path / "xattr.says").write_text("0081;65f1b2c3;Safari;F643CD5F")
    checks = await examine_mac()
    assert checks["gvproxy"].status == checks["vfkit"].status == "missing"
    assert f"xattr -d com.apple.quarantine {mac / 'gvproxy'}" in checks["gvproxy"].hint


@pytest.mark.usefixtures("bare_mac")
async def test_a_bare_mac_lacks_what_is_required():
    """No image is built on a Mac, so that is missing, too."""
    checks = await examine_mac()
    assert {name for name, check in checks.items() if check.status == "missing"} == {"vfkit", "gvproxy", "guest image"}
    assert "brew install vfkit" in checks["vfkit"].hint
    assert all(check.hint for check in checks.values() if check.status != "ok")


async def test_a_long_socket_directory_is_too_long_for_vfkit_sooner(mac, monkeypatch):
    """It makes up a name of its own, which is longer than ours; and some characters it takes for a URL's."""
    longest = paths.SOCKET_PATH_MAX_BYTES - len("/ovm/01234567/default/virtiofs-99.sock")
    base = Path("/" + "x" * (longest - 1))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    assert doctor.check_socket_dir("linux").status == "ok"
    assert doctor.check_socket_dir("darwin").status == "missing"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/a b")
    monkeypatch.delenv("OVM_HOME")
    assert "as a URL" in doctor.check_socket_dir("darwin").detail


@pytest.mark.parametrize(
    ("host", "linux", "words"),
    [
        (MacHost("arm64", (15, 1)), None, ""),
        (MacHost("x86_64", (15, 5)), (6, 12), ""),
        (MacHost("x86_64", ()), (6, 12), ""),
        (MacHost("arm64", (12, 6)), None, "version 12.6, Apple chip; this is macOS 12.6; vfkit needs 13"),
        (MacHost("x86_64", (15, 4)), (6, 12), "Intel chip; Linux 6.12 does not boot on an Intel Mac before macOS 15.5"),
        (MacHost("x86_64", (15, 4), translated=True), None, "Apple chip; this Python is an Intel program"),
    ],
)
def test_a_mac_is_old_enough_for_its_image(host, linux, words):
    check = doctor.check_mac(host, linux)
    assert check.status == ("missing" if words else "ok")
    assert words in check.detail
    assert bool(check.hint) == bool(words)


async def test_the_images_kernel_is_the_one_that_is_meant(mac, tmp_path, monkeypatch):
    """A machine of the default image would not boot, which the doctor knows from its file."""
    monkeypatch.setattr(macos, "this_host", lambda: MacHost("x86_64", (14, 7)))
    monkeypatch.setattr(macos, "linux_version", lambda path: (6, 12) if path.name == "kernel" else None)
    assert (await examine_mac())["system"].status == "missing"
