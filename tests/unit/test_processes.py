"""What the end-to-end tests know of processes on a Mac is what they know on Linux: asked here in both ways."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import GONE, Proc, Tools, freeze

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="two ways to ask are on Linux alone")


@pytest.fixture
def ways() -> tuple[Proc, Tools]:
    """Linux's own, and macOS's by the tools of the same name."""
    if missing := [name for name in ("lsof", "ps") if not shutil.which(name)]:
        pytest.skip(f"there is no {' and no '.join(missing)} here")
    return Proc(), Tools()


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that works in ``tmp_path`` and has nothing open there."""
    argv = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "x" * 300]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()  # for a moment after its exec a program has no command line
        yield process


def test_holders_are_who_have_a_file_open(ways, sleeper, tmp_path):
    """Whatever became of its name; neither we, nor a neighbour, nor who merely works there."""
    (tmp_path / "root").mkdir()
    held = tmp_path / "root" / "a b,c"
    for way in ways:
        with held.open("w") as ours, (tmp_path / "root-not").open("w") as beside:
            with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=ours) as holder:
                with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=beside) as neighbour:
                    assert way.holders(tmp_path / "root") == [holder.pid]
                    assert sorted(way.holders(tmp_path)) == sorted([holder.pid, neighbour.pid])
                    held.unlink()
                    assert way.holders(tmp_path / "root") == [holder.pid]
        assert way.holders(tmp_path) == []


def test_a_directory_may_be_named_by_a_link(ways, tmp_path):
    """As /tmp is on macOS."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (tmp_path / "real" / "held").open("w") as ours:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=ours) as holder:
            assert Tools().holders(tmp_path / "link") == [holder.pid]


def test_commands_and_zombies(ways, sleeper):
    """The beginning of a command line; of a zombie none, and it is one until it was waited for."""
    proc, tools = ways
    assert proc.command(sleeper.pid) == tools.command(sleeper.pid) == " ".join(sleeper.args)[:200]
    assert sleeper.pid not in (*proc.zombies(), *tools.zombies())
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert sleeper.pid in proc.zombies()
    assert sleeper.pid in tools.zombies()
    assert proc.command(sleeper.pid) == tools.command(sleeper.pid) == ""
    sleeper.wait()
    assert proc.command(sleeper.pid) == tools.command(sleeper.pid) == GONE
    assert sleeper.pid not in (*proc.zombies(), *tools.zombies())


def test_a_process_stands_still(ways, sleeper):
    """With all its threads, as soon as it was frozen, until it goes on."""
    assert not any(way.stands_still(sleeper.pid) for way in ways)
    freeze(sleeper.pid)
    assert all(way.stands_still(sleeper.pid) for way in ways)
    sleeper.send_signal(signal.SIGCONT)
    os.waitid(os.P_PID, sleeper.pid, os.WCONTINUED)
    assert not any(way.stands_still(sleeper.pid) for way in ways)


def test_own_descriptors(ways, tmp_path):
    """Files by their names, sockets and pipes by their number."""
    before = [way.own_descriptors() for way in ways]
    one, other = socket.socketpair()
    ends = os.pipe()
    with one, other, (tmp_path / "a file").open("w"):
        for way, had in zip(ways, before, strict=True):
            assert way.own_descriptors() - had == {"socket": 2, "pipe": 2, str(tmp_path / "a file"): 1}
    for end in ends:
        os.close(end)
    assert [way.own_descriptors() for way in ways] == before
