"""Who the helpers of a dead manager are, and that nobody else is ended in their place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import watched
from ovm.process import identity, orphans
from ovm.process.child import Child

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="what /proc tells")


class Sleepers:
    """Programs that do nothing, in the place of helpers."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, program: str | Path = "sleep", **how) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([program, "60"], **how)
        self.processes.append(process)
        return process


@pytest.fixture
def sleeper() -> Iterator[Sleepers]:
    sleepers = Sleepers()
    yield sleepers
    for process in sleepers.processes:
        process.kill()
        process.wait()


def child(name: str, process: subprocess.Popen[bytes]) -> Child:
    return Child(name, SimpleNamespace(pid=process.pid, returncode=None))


def dead() -> dict[str, object]:
    """A manager that has ended."""
    with subprocess.Popen(["sleep", "60"]) as process:
        who = identity.of(process.pid)
        process.kill()
    return described(who)


def described(who: identity.Identity) -> dict[str, object]:
    return {"pid": who.pid, "started": who.started, "program": who.program}


def write(path: Path, manager: dict[str, object], **helpers: dict[str, object]) -> None:
    path.write_text(json.dumps({"boot_id": identity.boot(), "manager": manager, "helpers": helpers}))
    path.chmod(0o600)


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Identity


def test_a_process_is_itself_alone(sleeper):
    """Two of the same program differ; each is found again for as long as it runs."""
    one, other = sleeper(), sleeper()
    first, second = identity.of(one.pid), identity.of(other.pid)
    assert first == identity.of(one.pid)
    assert first != second
    assert first.program == second.program == str(Path(shutil.which("sleep")).resolve())
    assert identity.is_there(first)
    assert identity.owner(one.pid) == os.geteuid()
    one.kill()
    os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)
    assert identity.of(one.pid) is None, "a zombie has ended"
    one.wait()
    assert identity.of(one.pid) is None
    assert not identity.is_there(first)
    assert identity.is_there(second)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 10**30])
def test_nobody(pid):
    """Numbers that no process has."""
    assert identity.of(pid) is None
    assert identity.owner(pid) is None


@ON_LINUX
@pytest.mark.parametrize("name", [") Z 1 (", "a b", "\udcff"])
def test_a_program_may_be_called_anything_and_be_gone(tmp_path, sleeper, name):
    """What runs is told by the path it was started from, whatever is there by now."""
    program = tmp_path / name
    shutil.copy(shutil.which("sleep"), program)
    process = sleeper(program)
    who = identity.of(process.pid)
    program.unlink()
    assert identity.of(process.pid).program == who.program
    assert identity.is_there(who)


def test_a_program_that_becomes_another_is_the_same_process():
    """It was started once; what it runs has changed."""
    with subprocess.Popen(["sh", "-c", "read -r _ && exec sleep 60"], stdin=subprocess.PIPE) as process:
        before = identity.of(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        while (after := identity.of(process.pid)).program == before.program:
            pass
        assert after != before
        assert identity.is_there(before)
        process.kill()


# The roster


def test_it_lies_there_for_as_long_as_it_is_kept(tmp_path, sleeper):
    """Private, with who is who, and gone when all have ended."""
    path = tmp_path / "helpers.json"
    one, other = sleeper(), sleeper()
    with orphans.keep(path) as kept:
        assert not path.exists()
        kept.add(child("gvproxy", one))
        kept.add(child("qemu", other))
        assert path.stat().st_mode & 0o777 == 0o600
        told = json.loads(path.read_text())
        assert told["manager"] == described(identity.of(os.getpid()))
        assert told["helpers"] == {
            "gvproxy": described(identity.of(one.pid)),
            "qemu": described(identity.of(other.pid)),
        }
        third = sleeper()
        kept.add(child("gvproxy", third))
        assert json.loads(path.read_text())["helpers"]["gvproxy"]["pid"] == third.pid
        for process in (one, other, third):
            process.kill()
            process.wait()
    assert list(tmp_path.iterdir()) == []


def test_it_stays_for_who_outlives_its_end(tmp_path, sleeper):
    """A helper that could not be ended is not forgotten, and so can be when the manager has gone."""
    path = tmp_path / "helpers.json"
    with orphans.keep(path) as kept:
        kept.add(child("qemu", sleeper()))
    assert path.exists()


def test_a_wrapper_becomes_what_it_wraps(tmp_path):
    """What a helper runs is looked at again when asked to."""
    path = tmp_path / "helpers.json"
    with subprocess.Popen(["sh", "-c", "read -r _ && exec sleep 60"], stdin=subprocess.PIPE) as process:
        with orphans.keep(path) as kept:
            kept.add(child("gvproxy", process))
            before = identity.of(process.pid).program
            process.stdin.write(b"\n")
            process.stdin.flush()
            while identity.of(process.pid).program == before:
                pass
            kept.update()
            assert json.loads(path.read_text())["helpers"]["gvproxy"] == described(identity.of(process.pid))
            process.kill()


def test_a_directory_that_cannot_be_written_to_is_no_obstacle(tmp_path, sleeper, caplog):
    """A machine starts all the same; only this precaution is missing, and it is said."""
    with orphans.keep(tmp_path / "missing" / "helpers.json") as kept:
        kept.add(child("qemu", sleeper()))
    assert "cannot be written" in caplog.text


def test_a_dead_managers_helpers_are_ended(tmp_path, sleeper):
    """All that are there, stopped ones included; they are gone when it returns. Those that are gone are no matter."""
    path = tmp_path / "helpers.json"
    one, other, gone = sleeper(), sleeper(), dead()
    write(path, dead(), gvproxy=described(identity.of(one.pid)), guard=gone, qemu=described(identity.of(other.pid)))
    one.send_signal(signal.SIGSTOP)
    with watched.watching({"one": one.pid, "other": other.pid}) as pidfds:
        assert orphans.reclaim(path) == ["gvproxy", "qemu"]
        assert watched.gone_within(0, *pidfds.values())
    assert orphans.reclaim(path) == []


def test_a_live_managers_helpers_are_not_touched(tmp_path, sleeper):
    """Nobody is ended for as long as there is somebody to look after them."""
    path = tmp_path / "helpers.json"
    helper = sleeper()
    write(path, described(identity.of(os.getpid())), qemu=described(identity.of(helper.pid)))
    assert orphans.reclaim(path) == []
    assert helper.poll() is None


@pytest.mark.parametrize("boot", ["another", ""])
def test_another_boots_are_nobodys(tmp_path, sleeper, boot):
    """After a reboot the same numbers are other processes, and so they are in a container."""
    path = tmp_path / "helpers.json"
    helper = sleeper()
    write(path, dead(), qemu=described(identity.of(helper.pid)))
    change(path, boot_id=boot)
    assert orphans.reclaim(path) == []
    assert helper.poll() is None


@pytest.mark.parametrize("wrong", [{"started": 1}, {"program": "/usr/bin/qemu"}, {"program": ""}])
def test_an_innocent_with_a_reused_pid_is_not_touched(tmp_path, sleeper, wrong):
    """It has the number alone in common with the helper, or that and one thing more. The others are ended still."""
    path = tmp_path / "helpers.json"
    innocent, helper = sleeper(), sleeper()
    write(
        path,
        dead(),
        gvproxy=described(identity.of(innocent.pid)) | wrong,
        qemu=described(identity.of(helper.pid)),
        ourselves=described(identity.of(os.getpid())),
    )
    assert orphans.reclaim(path) == ["qemu"]
    assert innocent.poll() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can start somebody else's process")
def test_another_users_process_is_not_touched(tmp_path, sleeper):
    """Not by root either, for whom no kernel would refuse it."""
    path = tmp_path / "helpers.json"
    theirs = sleeper(user=65534)
    write(path, dead(), qemu=described(identity.of(theirs.pid)))
    assert orphans.reclaim(path) == []
    assert theirs.poll() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can give a file away")
def test_another_users_roster_is_not_read(tmp_path, sleeper):
    """Else anybody who can write to a directory on the way could have our processes ended."""
    path = tmp_path / "helpers.json"
    helper = sleeper()
    write(path, dead(), qemu=described(identity.of(helper.pid)))
    os.chown(path, 65534, 65534)
    assert orphans.reclaim(path) == []
    os.chown(path, 0, 0)
    path.chmod(0o666)
    assert orphans.reclaim(path) == []
    path.rename(tmp_path / "real")
    path.symlink_to(tmp_path / "real")
    (tmp_path / "real").chmod(0o600)
    assert orphans.reclaim(path) == []
    assert helper.poll() is None
    assert orphans.reclaim(tmp_path / "real") == ["qemu"]


RUBBISH = [
    b"",
    b"{}",
    b"null",
    b"\xff\xfe",
    b"[" * 50_000,
    b'{"boot_id": "x"',
    b'{"boot_id": "\\ud800", "manager": 1}',
    b"\x00" * 200_000,
]


@pytest.mark.parametrize("content", RUBBISH, ids=lambda content: repr(content[:20]))
def test_rubbish_is_ignored(tmp_path, content):
    """Whatever is there in its place."""
    path = tmp_path / "helpers.json"
    path.write_bytes(content)
    path.chmod(0o600)
    assert orphans.reclaim(path) == []


@pytest.mark.parametrize("pid", [0, -1, 2**31, 1.5, "1", None])
def test_numbers_that_name_no_process_are_ignored(tmp_path, pid, sleeper):
    """Zero and less would be whole groups of processes to the kernel."""
    path = tmp_path / "helpers.json"
    helper = sleeper()
    write(path, dead(), qemu=described(identity.of(helper.pid)), bad={"pid": pid, "started": 1, "program": "/bin/sh"})
    assert orphans.reclaim(path) == []
    assert helper.poll() is None


def test_no_file_is_nothing_to_do(tmp_path):
    """Nor is a directory, a fifo, or a name that no file can have."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "none", tmp_path, tmp_path / "fifo", Path("a\0b")):
        assert orphans.reclaim(path) == []
