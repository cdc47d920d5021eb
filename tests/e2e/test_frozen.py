"""Apps frozen by PyInstaller: they are their own guard, in one directory and in one file, and carry all they need."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import ovm
import tiny
from ovm.image import build
from ovm.process import confine
from watched import gone_within, still_there, watching

pytestmark = pytest.mark.frozen

SPEC = Path(__file__).with_name("frozen") / "apps.spec"
GONE_S = 20.0
APPS = {"hooked": "onedir/hooked", "calling": "onedir/calling", "onefile": "onefile", "careless": "onedir/careless"}
GUARDED = ["hooked", "calling", "onefile"]

Bundles = Mapping[str, Path]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """The apps, frozen as their author would freeze them."""
    bindepend = pytest.importorskip("PyInstaller.depend.bindepend")
    if not shutil.which("objdump"):
        pytest.skip("PyInstaller needs objdump: apt-get install binutils")
    if not bindepend.get_python_library_path():
        pytest.skip("PyInstaller needs a Python with a shared library: apt-get install libpython3-dev, or another one")
    root = tmp_path_factory.mktemp("frozen")
    command = ["--noconfirm", "--log-level", "WARN", "--distpath", root / "dist", "--workpath", root / "work", SPEC]
    done = subprocess.run(
        [sys.executable, "-m", "PyInstaller", *map(str, command)],
        env=os.environ | {"PYINSTALLER_CONFIG_DIR": str(root / "config")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: root / "dist" / path for name, path in APPS.items()}


@contextmanager
def running(app: Path, *arguments: str, tmp: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """The app in a session of its own, and what it tells first; ``tmp`` is where one file is unpacked."""
    tmp.mkdir()
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_"))}
    process = subprocess.Popen(
        [app, *arguments],
        env=outside | {"TMPDIR": str(tmp)} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def guarding(app: Path, directory: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, int], dict[str, int]]]:
    """The app with a guard and a helper: its process, the pids it tells, and pidfds of them."""
    with running(app, "group", str(directory), tmp=directory / "tmp") as (process, told):
        with watching(told) as watched:
            assert still_there(*watched.values())
            yield process, told, watched


@pytest.mark.parametrize("name", GUARDED)
def test_a_killed_app_takes_its_helpers_along(bundles: Bundles, tmp_path: Path, name: str) -> None:
    """After SIGKILL of the app, guard and helper are gone; the guard was one process, the app's own child."""
    with guarding(bundles[name], tmp_path) as (_, told, watched):
        assert parent(told["guard"]) == told["manager"]
        assert os.getpgid(told["helper"]) == os.getpgid(told["guard"]) == told["guard"]
        assert Path(f"/proc/{told['guard']}/exe").samefile(bundles[name])
        signal.pidfd_send_signal(watched["manager"], signal.SIGKILL)
        assert gone_within(GONE_S, *watched.values())


def test_one_file_keeps_its_guard_when_its_loader_is_killed(bundles: Bundles, tmp_path: Path) -> None:
    """One file's loader unpacks it and waits; killed, it takes nothing along, and the app is guarded as before."""
    with guarding(bundles["onefile"], tmp_path) as (loader, told, watched):
        assert parent(told["manager"]) == loader.pid
        loader.kill()
        loader.wait()
        assert not gone_within(1, watched["manager"])
        assert still_there(*watched.values())
        signal.pidfd_send_signal(watched["manager"], signal.SIGKILL)
        assert gone_within(GONE_S, *watched.values())


@pytest.mark.parametrize("name", GUARDED)
def test_an_app_that_is_removed_while_it_runs_is_guarded(bundles: Bundles, tmp_path: Path, name: str) -> None:
    """The guard has read all that it needs: it does its work when no file of the app is left."""
    installed = tmp_path / "installed"
    if name == "onefile":
        shutil.copy2(bundles[name], installed)
        app = installed
    else:
        shutil.copytree(bundles[name].parent, installed, symlinks=True)
        app = installed / name
    with guarding(app, tmp_path) as (_, _, watched):
        subprocess.run(["rm", "-rf", installed, *(tmp_path / "tmp").iterdir()], check=True)
        signal.pidfd_send_signal(watched["manager"], signal.SIGKILL)
        assert gone_within(GONE_S, *watched.values())


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("how", ["its work is done", "SIGTERM"])
def test_an_app_that_ends_leaves_nothing(bundles: Bundles, tmp_path: Path, name: str, how: str) -> None:
    """Neither a process nor an unpacked file is left; a signal to one file's loader reaches the app."""
    with guarding(bundles[name], tmp_path) as (process, _, watched):
        if how == "SIGTERM":
            process.terminate()
        else:
            process.stdin.close()  # type: ignore[union-attr]
        assert gone_within(GONE_S, *watched.values())
        assert process.wait(GONE_S) == (-signal.SIGTERM if how == "SIGTERM" else 0)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("name", GUARDED)
def test_a_helper_sees_nothing_of_the_loader(bundles: Bundles, tmp_path: Path, name: str) -> None:
    """QEMU is to run with the system's libraries, another frozen app as one of its own. This one began as the app."""
    with guarding(bundles[name], tmp_path) as (_, told, _):
        assert_becomes_a_helper(told["helper"])
        mine = Path(f"/proc/{told['manager']}/environ").read_bytes()
        helpers = Path(f"/proc/{told['helper']}/environ").read_bytes()
    assert b"LD_LIBRARY_PATH" in mine
    assert b"_PYI_" in mine
    assert b"LD_LIBRARY_PATH" not in helpers
    assert b"_PYI_" not in helpers


def test_an_app_that_cannot_be_a_guard_says_so(bundles: Bundles, tmp_path: Path) -> None:
    """Without hook and without call it is told what to do, and is not started a second time."""
    with running(bundles["careless"], "group", str(tmp_path), tmp=tmp_path / "tmp") as (process, told):
        assert process.wait(GONE_S) == 1
    assert told["error"] == "StartError"
    assert "ovm.freeze_support()" in told["hint"]
    assert len((tmp_path / "starts").read_text().split()) == 1


@pytest.mark.parametrize("name", ["hooked", "onefile"])
def test_an_app_carries_the_whole_library(bundles: Bundles, tmp_path: Path, name: str) -> None:
    """Every public name and the guest's files are there; a build of an image sees the user's libraries alone."""
    with running(bundles[name], "facts", tmp=tmp_path / "tmp", LD_LIBRARY_PATH="/the/user's") as (process, told):
        assert process.wait(GONE_S) == 0
    assert told["frozen"]
    assert told["names"] == ovm.__all__
    assert told["guest_files"] == {name: hashlib.sha256(content).hexdigest() for name, content in build.guest_files()}
    assert told["builders_libraries"] == "/the/user's"


@pytest.mark.tiny
@pytest.mark.parametrize("name", ["hooked", "onefile"])
@pytest.mark.parametrize("how", ["its work is done", "SIGKILL"])
async def test_an_app_runs_a_machine(
    bundles: Bundles, machines: tiny.Machines, tmp_path: Path, name: str, how: str
) -> None:
    """A machine starts in a frozen app; when the app ends or is killed, nothing of it is left."""
    options = json.dumps(machines.options())
    with running(bundles[name], "machine", options, tmp=tmp_path / "tmp") as (process, told):
        assert set(told) == {"manager"}, told
        assert len(tiny.holders(machines.root)) >= 4  # guard, gvproxy, the hypervisor (and its helpers), the app
        if how == "SIGKILL":
            os.kill(told["manager"], signal.SIGKILL)
        else:
            process.stdin.close()  # type: ignore[union-attr]
        deadline = time.monotonic() + 10 * GONE_S
        while tiny.holders(machines.root) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert tiny.holders(machines.root) == []
        assert process.wait(GONE_S) == (-signal.SIGKILL if how == "SIGKILL" else 0)
    if how == "SIGKILL":  # what a dead one has left is the next one's to take
        async with (await machines()).ovm as next_one:
            assert next_one.state == ovm.VMState.RUNNING


def assert_becomes_a_helper(pid: int) -> None:
    """By and by: it starts as the app, which takes its time."""
    deadline = time.monotonic() + GONE_S
    while Path(f"/proc/{pid}/comm").read_text() != "sleep\n" and time.monotonic() < deadline:
        time.sleep(0.02)
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Name:\tsleep\n" in status
    assert "NoNewPrivs:\t1\n" in status or not confine.available()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
