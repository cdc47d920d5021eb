"""Helper programs: told apart by what they print, found where they lie."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from ovm.errors import HelperError, UnsupportedError
from ovm.host import programs
from ovm.process.probe import GVPROXY, QEMU, VFKIT, VIRTIOFSD, check_helper, parse_version, probe_output, show_version


@pytest.fixture
def bare_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without any helper; what a test puts into the returned directory is on PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "home"))
    for table in ("_GVPROXY_DIRS", "_QEMU_DIRS", "_VFKIT_DIRS", "_VIRTIOFSD_DIRS"):
        monkeypatch.setattr(programs, table, ())
    return directory


def put_program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("program", "output", "version"),
    [
        (GVPROXY, "gvproxy version v0.8.9\n", (0, 8, 9)),
        (GVPROXY, "gvproxy version v0.8.1\n", (0, 8, 1)),
        (GVPROXY, "gvproxy version 0.7.5-dev\n", (0, 7, 5)),
        (GVPROXY, "gvproxy version (devel)\n", None),
        (GVPROXY, "flag provided but not defined: -version\n", None),
        (QEMU, "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022\n", (7, 2, 22)),
        (QEMU, "QEMU emulator version 10.0.2\n", (10, 0, 2)),
        (VIRTIOFSD, "virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7)\nusing FUSE kernel interface 7.36\n", (7, 2, 22)),
        (VIRTIOFSD, "virtiofsd 1.13.2\n", (1, 13, 2)),
        (VIRTIOFSD, "virtiofsd backend 1.1.0\n", (1, 1, 0)),
        (VFKIT, "vfkit version: v0.6.4\n", (0, 6, 4)),
        (VFKIT, "vfkit version: 0.5.1\n", (0, 5, 1)),
        (VFKIT, "vfkit version: v0.6.2-17-g3f0c1d2-dirty\n", (0, 6, 2)),
        (VFKIT, "vfkit version: unknown\n", None),
        (VFKIT, "Error: unknown flag: --version\n", None),
    ],
)
def test_version_is_read_from_what_a_program_prints(program, output, version):
    """The version is what the real programs of several distributions print, or nothing."""
    assert parse_version(output, program.pattern) == version


async def test_version_on_stderr_counts(tmp_path: Path):
    """Some programs print their version on stderr and exit with a status."""
    program = put_program(tmp_path / "gvproxy", "echo gvproxy version v1.2.3 >&2; exit 2")
    assert await check_helper(program, GVPROXY) == (1, 2, 3)


async def test_hanging_program_is_ended_with_its_children(tmp_path: Path):
    """A program that hangs costs the deadline, and neither it nor its child is left."""
    program = put_program(tmp_path / "hangs", f"sleep 60 & echo $! > {tmp_path}/child; wait")
    begun = time.monotonic()
    with pytest.raises(HelperError, match=r"did not end within 0\.1 s"):
        await probe_output([program, "-version"], timeout=0.1)
    assert time.monotonic() - begun < 2
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("the child still runs")


async def test_something_else_is_refused_with_what_it_printed(tmp_path: Path):
    """A file of the right name that is another program is refused, and the error shows why."""
    program = put_program(tmp_path / "gvproxy", "echo hello")
    with pytest.raises(HelperError) as caught:
        await check_helper(program, GVPROXY)
    assert caught.value.log_tail == ("hello",)
    assert "gvproxy@v0.8.9" in caught.value.hint


async def test_given_helper_must_be_an_executable_file(tmp_path: Path):
    """What is missing or not executable is refused without being run."""
    with pytest.raises(HelperError, match="is not a file"):
        await check_helper(tmp_path / "none", QEMU)
    plain = put_program(tmp_path / "plain", "exit 0")
    plain.chmod(0o644)
    with pytest.raises(HelperError, match="is not executable"):
        await check_helper(plain, QEMU)
    not_a_program = put_program(tmp_path / "garbage", "")
    not_a_program.write_bytes(b"\x7fELF garbage")
    with pytest.raises(HelperError, match="cannot be run"):
        await check_helper(not_a_program, QEMU)


async def test_gvproxy_on_path_wins(bare_host: Path):
    """What is on PATH is taken before what the set-up installed."""
    put_program(programs.own_bin_dir() / "gvproxy", "echo gvproxy version v0.8.9")
    on_path = put_program(bare_host / "gvproxy", "echo gvproxy version v0.8.1")
    found = await programs.find_gvproxy()
    assert (found.path, found.version) == (on_path, (0, 8, 1))


async def test_old_gvproxy_is_passed_over(bare_host: Path):
    """A gvproxy on PATH that is too old does not hide a newer one elsewhere."""
    put_program(bare_host / "gvproxy", "echo gvproxy version v0.7.5")
    own = put_program(programs.own_bin_dir() / "gvproxy", "echo gvproxy version v0.8.9")
    assert (await programs.find_gvproxy()).path == own


async def test_too_old_everywhere_is_said(bare_host: Path):
    """Where only an old one is there, the error names it, its version and the one needed."""
    put_program(bare_host / "qemu-system-x86_64", "echo QEMU emulator version 6.2.0")
    with pytest.raises(HelperError, match=r"6\.2\.0; 7\.2 or newer is required"):
        await programs.find_qemu("amd64")


async def test_an_old_vfkit_is_refused_with_the_reason(tmp_path: Path):
    """Before 0.6.2 it takes SIGTERM for a power cut, which is worth saying."""
    program = put_program(tmp_path / "vfkit", "echo vfkit version: v0.6.1")
    with pytest.raises(HelperError, match=r"is vfkit 0\.6\.1; 0\.6\.2 or newer is required: on SIGTERM, .* power"):
        await check_helper(program, VFKIT)


@pytest.mark.parametrize("said", ["unknown", "", "3f0c1d2", "3f0c1d2-dirty"])
async def test_a_vfkit_that_does_not_know_its_version_is_taken(tmp_path: Path, caplog, said):
    """Builds without git or tags say that, and say so in the log."""
    program = put_program(tmp_path / "vfkit", f"echo 'vfkit version: {said}'")
    version = await check_helper(program, VFKIT)
    assert version == ()
    assert show_version(version) == "unknown"
    assert str(programs.Helper(program, version)) == f"{program} (unknown)"
    assert "is a build of vfkit without a version number" in caplog.text


async def test_what_only_looks_like_a_vfkit_is_refused(tmp_path: Path):
    """Neither an error nor another program passes for a build without a version."""
    for said in ("Error: unknown flag: --version", "vfkit version: yes", "my vfkit version: unknown"):
        with pytest.raises(HelperError, match="does not print its version"):
            await check_helper(put_program(tmp_path / "vfkit", f"echo '{said}'"), VFKIT)


async def test_vfkit_is_found_beside_podman(bare_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Homebrew's podman keeps its own off PATH, and an old one on PATH does not hide it."""
    put_program(bare_host / "vfkit", "echo vfkit version: 0.5.1")
    beside = put_program(tmp_path / "libexec" / "podman" / "vfkit", "echo vfkit version: v0.6.4")
    monkeypatch.setattr(programs, "_VFKIT_DIRS", (str(beside.parent),))
    found = await programs.find_vfkit()
    assert (found.path, found.version) == (beside, (0, 6, 4))


@pytest.mark.usefixtures("bare_host")
async def test_missing_helpers_name_their_package():
    """What is not there is an error that says how to get it."""
    with pytest.raises(HelperError, match="gvproxy is not installed on this host") as caught:
        await programs.find_gvproxy()
    assert "go install" in caught.value.hint
    with pytest.raises(HelperError) as caught:
        await programs.find_qemu("arm64")
    assert "qemu-system-aarch64" in caught.value.message
    assert "qemu-system-arm" in caught.value.hint
    with pytest.raises(HelperError, match="virtiofsd"):
        await programs.find_virtiofsd()
    with pytest.raises(HelperError, match="vfkit is not installed on this host") as caught:
        await programs.find_vfkit()
    assert "brew install vfkit" in caught.value.hint
    with pytest.raises(UnsupportedError):
        await programs.find_qemu("riscv64")


async def test_virtiofsd_tells_its_flavour(bare_host: Path):
    """The Rust virtiofsd and QEMU's old C one are told apart by their versions."""
    program = put_program(bare_host / "virtiofsd", "echo virtiofsd 1.10.1")
    assert (await programs.find_virtiofsd()).flavour == "rust"
    put_program(program, "echo virtiofsd version 7.2.22")
    assert (await programs.find_virtiofsd()).flavour == "c"


async def test_links_to_one_program_are_asked_once(bare_host: Path, tmp_path: Path):
    """Several links to the same unusable program give its evidence once."""
    program = put_program(tmp_path / "real", "echo nothing")
    (bare_host / "gvproxy").symlink_to(program)
    programs.own_bin_dir().mkdir(parents=True)
    (programs.own_bin_dir() / "gvproxy").symlink_to(program)
    with pytest.raises(HelperError) as caught:
        await programs.find_gvproxy()
    assert caught.value.log_tail.count("nothing") == 1
