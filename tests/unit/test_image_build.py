"""Builds that fail, are interrupted or killed: with a mmdebstrap of our own that does as the test likes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from ovm.errors import ImageError, OptionError
from ovm.image import BuildOptions, build_image, load_image, remove_image
from ovm.image import build as builder

GOOD = """\
echo "I: downloading packages"
echo "ovm: kernel"
mkdir out && cd out
for f in kernel initrd manifest; do echo $f >$f; done
truncate -s 1M rootfs.btrfs
echo 6.12 >kernel-version
printf 'podman 5.4.2\\nsystemd 257\\n' >packages
tar -cSf ../out.tar .
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host whose mmdebstrap is a script; returns what writes it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("mkfs.btrfs", "xz"):
        _script(programs / name, "exit 0")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(builder, "_keyring", lambda: Path("/dev/null"))
    return lambda text: _script(programs / "mmdebstrap", text)


def _script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def options(tmp_path, **changes):
    return BuildOptions(output=tmp_path / "images" / "a", mirror="http://mirror.example/debian", **changes)


def left(tmp_path):
    return sorted(path.name for path in (tmp_path / "images").iterdir())


async def test_a_build(host, tmp_path):
    """Stages are reported, the result describes itself, and nothing else is left."""
    host(GOOD)
    said = []
    image = await build_image(options(tmp_path), progress=lambda stage, detail: said.append((stage, detail)))
    assert ("install", "downloading packages") in said
    assert [stage for stage, _ in said if stage == "kernel"] == ["kernel"]
    assert image.versions == {"podman": "5.4.2", "systemd": "257", "kernel": "6.12"}
    assert image.files["rootfs"].size == 1 << 20
    assert image.files["rootfs"].data_bytes < 1 << 20
    assert left(tmp_path) == ["a"]
    assert (image.directory / "build.log").read_text().startswith("+ setpriv")


async def test_a_build_replaces_the_image_before_it(host, tmp_path):
    """The old one is there until the new one is."""
    host(GOOD)
    await build_image(options(tmp_path))
    (tmp_path / "images" / "a" / "old").touch()
    await build_image(options(tmp_path))
    assert not (tmp_path / "images" / "a" / "old").exists()
    assert left(tmp_path) == ["a"]


async def test_zip(host, tmp_path):
    """The archive has one member, the rootfs."""
    import zipfile

    host(GOOD)
    image = await build_image(options(tmp_path, zip=True))
    with zipfile.ZipFile(image.directory / "rootfs.btrfs.zip") as archive:
        assert archive.namelist() == ["rootfs.btrfs"]
        assert archive.testzip() is None


async def test_a_failed_build_says_where_and_why(host, tmp_path):
    """Stage, status and last lines; the whole log stays."""
    host('echo "ovm: initrd"; echo "it went wrong" >&2; exit 7')
    with pytest.raises(ImageError) as failure:
        await build_image(options(tmp_path))
    assert failure.value.stage == "initrd"
    assert failure.value.exit_reason == "exit status 7"
    assert failure.value.log_tail[-1] == "it went wrong"
    assert left(tmp_path) == ["a.build.log"]


async def test_a_failed_build_spares_the_image_before_it(host, tmp_path):
    """Nobody loses a working image to a failed update."""
    host(GOOD)
    await build_image(options(tmp_path))
    host("exit 1")
    with pytest.raises(ImageError):
        await build_image(options(tmp_path))
    load_image(tmp_path / "images" / "a")


async def test_a_cancelled_build_leaves_nothing(host, tmp_path):
    """Its programs end too."""
    host(f"echo $$ >{tmp_path}/pid; exec sleep 100")
    task = asyncio.create_task(build_image(options(tmp_path)))
    pid = await _pid(tmp_path / "pid")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left(tmp_path) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_what_a_killed_build_left_is_removed_by_the_next(host, tmp_path):
    """Killed, it cannot clean up; but its programs end with it, and nothing it left looks finished."""
    host(f"echo $$ >{tmp_path}/pid; exec sleep 100")
    code = (
        "import asyncio, sys; from pathlib import Path; from ovm.image import build as b; "
        "b._keyring = lambda: Path('/dev/null'); "
        "asyncio.run(b.build_image(b.BuildOptions(output=Path(sys.argv[1]), mirror='http://mirror.example/debian')))"
    )
    target = tmp_path / "images" / "a"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, os.fspath(target))
    pid = await _pid(tmp_path / "pid")
    process.kill()
    await process.wait()
    await asyncio.to_thread(_wait_gone, pid)
    assert len(left(tmp_path)) == 1
    assert left(tmp_path)[0].startswith(".a.building-")
    with pytest.raises(ImageError):
        load_image(target)
    host(GOOD)
    await build_image(options(tmp_path))
    assert left(tmp_path) == ["a"]


async def test_a_build_under_way_is_left_alone(host, tmp_path):
    """Two at once do not remove each other's work."""
    host(f"echo $$ >{tmp_path}/pid; exec sleep 100")
    first = asyncio.create_task(build_image(options(tmp_path)))
    await _pid(tmp_path / "pid")
    host(GOOD)
    await build_image(options(tmp_path))
    assert len(left(tmp_path)) == 2
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert left(tmp_path) == ["a"]


async def test_missing_programs_are_named_by_their_packages(tmp_path, monkeypatch):
    """All at once, so that one apt-get is enough."""
    monkeypatch.setattr(builder.shutil, "which", lambda tool, path=None: None if tool != "setpriv" else tool)
    with pytest.raises(ImageError) as failure:
        await build_image(options(tmp_path))
    assert failure.value.hint == "run apt-get install btrfs-progs mmdebstrap xz-utils"


FOREIGN = "arm64" if builder.host_arch() == "amd64" else "amd64"


async def test_a_foreign_architecture_needs_an_emulator(host, tmp_path):
    """It is tried, as mmdebstrap will; the packages that bring it are named, and what a container lacks."""
    _script(tmp_path / "bin" / "arch-test", f'[ "$1" != {FOREIGN} ]')
    with pytest.raises(ImageError, match=FOREIGN) as failure:
        await build_image(options(tmp_path, arch=FOREIGN))
    assert "qemu-user-static" in failure.value.hint
    assert "binfmt_misc" in failure.value.hint


async def test_a_foreign_architecture_that_runs_is_built(host, tmp_path):
    """Whatever runs its programs, under whatever name it is registered."""
    _script(tmp_path / "bin" / "arch-test", f'[ "$1" = {FOREIGN} ]')
    host(GOOD)
    assert (await build_image(options(tmp_path, arch=FOREIGN))).arch == FOREIGN


async def test_other_peoples_directories_are_not_replaced(host, tmp_path):
    """-o with a wrong path must not cost a directory."""
    precious = tmp_path / "images" / "a"
    precious.mkdir(parents=True)
    (precious / "file").touch()
    with pytest.raises(ImageError, match="exists and is not a guest image"):
        await build_image(options(tmp_path))
    with pytest.raises(ImageError):
        remove_image(precious)
    assert (precious / "file").exists()


@pytest.mark.parametrize(
    "wrong", [{"arch": "mips"}, {"suite": "trixie; rm"}, {"suite": "trixi"}, {"mirror": "not a url"}]
)
def test_options_are_checked_before_anything_is_done(wrong):
    """They end up on a command line."""
    with pytest.raises(OptionError):
        BuildOptions(**wrong)


@pytest.mark.parametrize("given", [{}, {"suite": "forky"}, {"suite": "ours", "mirror": "https://deb.example/debian"}])
def test_a_suite_is_debians_or_one_of_a_named_archive(given):
    """trixie unless something else is asked for; what another archive calls its suites is not known here."""
    assert BuildOptions(**given).suite == given.get("suite", "trixie")


async def _pid(path):
    async with asyncio.timeout(10):
        while not (path.exists() and path.read_text().endswith("\n")):
            await asyncio.sleep(0.01)
    return int(path.read_text())


def _wait_gone(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, signal.SIG_DFL)
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} lives on")
