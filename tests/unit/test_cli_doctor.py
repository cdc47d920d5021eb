"""``ovm doctor``: what is missing is said, with how to get it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ovm import cli, helpers
from ovm.cli import doctor
from ovm.cli.doctor import Check


@pytest.fixture
def bare_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without any helper or builder; what a test puts into the returned directory is on PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(doctor, "_SBIN", ())
    for table in ("_GVPROXY_DIRS", "_QEMU_DIRS", "_VIRTIOFSD_DIRS"):
        monkeypatch.setattr(helpers, table, ())
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
        put_empty_image(tmp_path / "home" / "images" / f"default-{arch}", arch)
    status, out = examine(capsys)
    assert status == 0, out
    assert "missing " not in out
    assert "accelerator" in out
    assert "gvproxy (0.8.9)" in out


def test_table_shows_hints_below_what_lacks_something():
    """The table has one line for each check, and a second one where something is to be done."""
    lines = doctor.table([Check("a", "ok", "fine", "unused"), Check("bcd", "missing", "gone", "get it")])
    assert [line.split() for line in map(plain, lines)] == [
        ["ok", "a", "fine"],
        ["missing", "bcd", "gone"],
        ["→", "get", "it"],
    ]


def put_empty_image(directory: Path, arch: str) -> None:
    directory.mkdir(parents=True)
    for name in ("kernel", "initrd", "rootfs.btrfs"):
        (directory / name).touch()
    files = {role: {"size": 0, "sha256": ""} for role in ("kernel", "initrd", "rootfs")}
    (directory / "image.json").write_text(json.dumps({"format": 1, "guest": "ovm", "arch": arch, "files": files}))


def plain(line: str) -> str:
    import click

    return click.unstyle(line)


def test_directory_open_to_others_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory for sockets that others can enter is a warning, with the command that closes it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("OVM_HOME", raising=False)
    directory = tmp_path / "ovm" / "default"
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    assert doctor.check_socket_dir() == Check(
        "socket paths", "warn", f"{directory} is open to others (755)", f"chmod 700 {directory}"
    )
    directory.chmod(0o700)
    assert doctor.check_socket_dir().status == "ok"


def test_long_socket_directory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a socket's path would not fit no machine starts, so it is missing, not a warning."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    assert doctor.check_socket_dir().status == "missing"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_home_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where nothing can be written nothing can be made."""
    tmp_path.chmod(0o500)
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "home"))
    assert doctor.check_home().status == "missing"


def test_other_systems_are_told():
    """Where machines do not run that is the first thing to know."""
    assert doctor.check_platform("darwin").status == "missing"
    assert doctor.check_platform("linux").status == "ok"
