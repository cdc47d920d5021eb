"""Rows B13, B22, B23: several write a machine's settings, or they cannot be written where they are."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import soak
from ovm import cli, errors
from ovm.integrations import docker_context
from ovm.registry import machines, removal
from ovm.registry.machines import Machine
from ovm.trust import atomic, locks
from strangers import Stranger

WRITERS = 12
HOLDER = """
import sys, pathlib
from ovm.trust import locks
with locks.held(pathlib.Path(sys.argv[1]), wait_s=9):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OVM_HOME", str(short_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path / "run"))
    monkeypatch.setenv("DOCKER_CONFIG", str(short_path / "docker"))
    return short_path / "home"


@pytest.fixture
def machine(home: Path) -> Machine:
    """A machine that was made and never started."""
    assert ovm("init", "dev") == 0
    return machines.find("dev")


def ovm(*args: str) -> int:
    """The status of ``ovm ARGS``, done by this process."""
    try:
        cli.main(args)
    except SystemExit as ended:
        return int(ended.code or 0)
    raise AssertionError("it did not end")


def forked(action: Callable[[], int]) -> int:
    """The pid of a process that does ``action`` and ends with what that returns."""
    if pid := os.fork():
        return pid
    status = 99
    try:
        status = action()
    except BaseException:  # noqa: BLE001 - it is a process of its own
        traceback.print_exc()
    os._exit(status)


def at_once(actions: list[Callable[[], int]]) -> list[int]:
    """The statuses of processes that begin in the same moment."""
    reading, writing = os.pipe()

    def when_told(action: Callable[[], int]) -> int:
        os.close(writing)
        os.read(reading, 1)  # until the pipe is closed
        return action()

    pids = [forked(lambda action=action: when_told(action)) for action in actions]
    os.close(reading)
    os.close(writing)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(atomic.TEMPORARY_PREFIX)]


# B13


@pytest.mark.soak
def test_what_is_reported_as_set_is_kept(machine):
    """B13: a dozen `ovm config set` at once, each several times: the last value of each is there."""

    def set_some(name: str) -> int:
        return max(ovm("config", "set", f"environment.{name}", str(turn), "--machine", "dev") for turn in range(3))

    names = [f"WRITER_{number}" for number in range(WRITERS)]
    assert at_once([lambda name=name: set_some(name) for name in names]) == [0] * WRITERS
    assert machine.settings().environment == dict.fromkeys(names, "2")
    assert leftovers(machine.directory) == []


def test_every_command_that_writes_settings_keeps_those_of_others(machine, monkeypatch):
    """B13: options of `ovm start`, `ovm autostart`, `config set` and a test run's template, at once."""
    from ovm.cli import init

    machine.write_settings("# mine\n")
    keys = [("cpus", "3"), ("memory", "1G"), ("hostname", "here"), ("timezone", "UTC")]
    actions: list[Callable[[], int]] = [
        lambda key=key, value=value: ovm("config", "set", key, value, "--machine", "dev") for key, value in keys
    ]
    actions += [
        lambda: init.write(machine, {"disk": "70G"}) and 0,
        lambda: init.write(machine, {"podman_tcp": True}) and 0,
    ]
    assert at_once(actions) == [0] * 6
    found = machine.settings()
    assert (found.cpus, found.memory, found.hostname, found.timezone) == (3, 1024, "here", "UTC")
    assert (found.disk, found.podman_tcp) == (70 << 10, True)
    assert machine.settings_text().startswith("# mine\n")


def test_of_those_who_make_a_machine_at_once_one_does(home):
    """B13: the others are refused, and the machine is what that one was told to make."""
    statuses = at_once(
        [lambda cpus=cpus: cpus if ovm("init", "dev", "--cpus", str(cpus)) else 0 for cpus in range(1, 9)]
    )
    (made,) = [cpus for cpus in range(1, 9) if cpus not in statuses]
    assert machines.find("dev").settings().cpus == made


@pytest.mark.soak
def test_a_write_that_is_killed_leaves_one_whole_version(machine):
    """B13: kill -9 at any moment; what it leaves beside the settings the next write removes, and its lock is free."""
    random = soak.random("settings")

    def write_without_end() -> int:
        number = 0
        while True:
            number += 1
            text = f"cpus = {number % 200 + 1}\n" + "".join(f'environment.V{n} = "{number}"\n' for n in range(300))
            machine.write_settings(text)

    machine.write_settings("cpus = 1\n")
    for _ in range(soak.times(300)):
        pid = forked(write_without_end)
        select.select([], [], [], random.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = machine.settings()
        assert len(set(found.environment.values())) == (1 if found.environment else 0)
        assert len(found.environment) in {0, 300}
    machine.write_settings("cpus = 7\n")
    assert machine.settings_text() == "cpus = 7\n"
    assert leftovers(machine.directory) == []


@contextlib.contextmanager
def another_holds(path: Path) -> Iterator[int]:
    """Another process of ours holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"\n"
        try:
            yield process.pid
        finally:
            process.kill()


def test_whoever_holds_the_lock_is_named(machine, monkeypatch):
    """B13: after a while, and nothing is changed."""
    monkeypatch.setattr(machines, "SETTINGS_WAIT_S", 0.05)
    before = machine.settings_text()
    with another_holds(machine.directory.parent / machines.SETTINGS_LOCK) as pid:
        with pytest.raises(errors.InUseError, match=f"held by process {pid}"):
            machine.write_settings("cpus = 2\n")
        with pytest.raises(errors.InUseError, match=f"held by process {pid}"):
            removal.remove(machine)
    assert machine.settings_text() == before
    machine.write_settings("cpus = 2\n")


def test_an_edit_is_not_written_over_a_change_that_came_meanwhile(machine, home, monkeypatch, capsys):
    """B13: `ovm config edit` holds no lock while a person edits; whoever is slower is told."""
    editor = home / "editor"
    editor.write_text(
        f'#!/bin/sh\n"{sys.executable}" -m ovm config set cpus 3 --machine dev && echo "cpus = 4" > "$1"\n'
    )
    editor.chmod(0o755)
    monkeypatch.setenv("EDITOR", str(editor))
    assert ovm("config", "edit", "dev") != 0
    assert "was changed while you edited it" in capsys.readouterr().err
    assert machine.settings().cpus == 3


def test_a_change_does_not_bring_back_a_machine_that_was_removed(machine):
    """B13: a removal and a change of settings exclude each other."""
    removal.remove(machine)
    with pytest.raises(errors.StateError, match="no machine called dev"):
        machine.change_settings(lambda text: text + "cpus = 2\n")
    assert not machine.directory.exists()


def test_two_writers_of_one_file_do_not_touch_each_others(short_path):
    """B13: each has a temporary file of its own, which no sweep removes; what a dead one left is removed."""
    first, second = (atomic.NewFile(short_path, "x") for _ in range(2))
    (short_path / f"{atomic.TEMPORARY_PREFIX}x.7").write_text("left")
    atomic.sweep(short_path)
    assert sorted(leftovers(short_path)) == sorted([first.path.name, second.path.name])
    for number, new in enumerate((first, second)):
        atomic.write_at(new.fd, b"%d" % number, 0)
        new.seal(0o600)
        new.place(short_path / "x")
    assert (short_path / "x").read_text() == "1"
    assert leftovers(short_path) == []


def test_writers_without_a_lock_each_write_a_whole_file(short_path):
    """B13: many processes write one file at once, as nothing keeps them from it; it is always one of theirs."""
    path = short_path / "x"

    def write(number: int) -> int:
        for _ in range(20):
            atomic.write_whole(path, b"%d" % number * 1000, 0o600, durable=False)
        return 0

    assert at_once([lambda number=number: write(number) for number in range(WRITERS)]) == [0] * WRITERS
    atomic.sweep(short_path)
    assert path.read_text() in {str(number) * 1000 for number in range(WRITERS)}
    assert leftovers(short_path) == []


# B23


def test_a_link_to_the_settings_stays(machine, short_path):
    """B23: what it leads to is replaced, whole, and may be in another directory or missing yet."""
    (short_path / "dotfiles").mkdir()
    target = short_path / "dotfiles" / "dev.toml"
    machine.settings_path.rename(target)
    (short_path / "dotfiles" / "second").symlink_to(target)
    machine.settings_path.symlink_to(short_path / "dotfiles" / "second")
    assert ovm("config", "set", "cpus", "3", "--machine", "dev") == 0
    assert machine.settings_path.is_symlink()
    assert not target.is_symlink()
    assert "cpus = 3" in target.read_text()
    target.unlink()
    assert ovm("config", "set", "cpus", "4", "--machine", "dev") == 0
    assert (machine.settings().cpus, target.exists()) == (4, True)
    assert leftovers(short_path / "dotfiles") == leftovers(machine.directory) == []


def test_a_link_that_leads_to_itself_is_refused(machine):
    """B23: with a typed error that names it; it stays."""
    machine.settings_path.unlink()
    machine.settings_path.symlink_to(machine.settings_path.name)
    with pytest.raises(errors.FileError, match=r"machine\.toml cannot be read") as refused:
        machine.change_settings(lambda text: text + "cpus = 2\n")
    assert refused.value.hint == f"remove the link {machine.settings_path}: it leads back to itself"
    with pytest.raises(OSError, match="symbolic links"):
        atomic.write_through(machine.settings_path, b"", 0o600)
    assert machine.settings_path.is_symlink()


def test_a_link_into_another_users_directory_is_refused(machine, short_path, stranger):
    """B23: they could exchange the file; nothing is written there."""
    short_path.chmod(0o1777)
    theirs = short_path / "theirs"
    stranger.does(theirs.mkdir)
    machine.settings_path.unlink()
    machine.settings_path.symlink_to(theirs / "dev.toml")
    with pytest.raises(errors.UntrustedError, match="belongs to the user"):
        machine.write_settings("cpus = 2\n")
    assert list(theirs.iterdir()) == []


def test_a_link_to_dockers_context_stays(machine, short_path):
    """B23: the same for the file of a docker context."""
    docker_context.add("dev", Path("/run/a"))
    (path,) = (short_path / "docker").rglob("meta.json")
    path.rename(short_path / "kept.json")
    path.symlink_to(short_path / "kept.json")
    docker_context.add("dev", Path("/run/b"))
    assert path.is_symlink()
    assert "/run/b" in (short_path / "kept.json").read_text()


# B22


def commands() -> list[tuple[str, ...]]:
    """Each that changes something."""
    return [
        ("init", "other"),
        ("start", "dev"),
        ("config", "set", "cpus", "2", "--machine", "dev"),
        ("rm", "-y", "dev"),
    ]


async def found() -> None:
    """A gvproxy."""


def theirs_and_read_only(home: Path, stranger: Stranger) -> None:
    """The home becomes that of the other user, who may not write there."""
    for path in [home, *home.rglob("*")]:
        os.chown(path, stranger.uid, stranger.uid)
        if path.is_dir():
            path.chmod(0o555)
    home.parent.chmod(0o755)


@pytest.mark.parametrize("args", commands(), ids=" ".join)
def test_a_home_that_cannot_be_written_to_is_named(machine, home, stranger, capfd, monkeypatch, args):
    """B22: for a user who may not write there, each command ends with one error and a hint that is true."""
    monkeypatch.setattr("ovm.host.programs.find_gvproxy", found)  # which a first start looks for before all else
    theirs_and_read_only(home, stranger)
    assert stranger.does(ovm, *args) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "hint: check " in said
    assert stranger.does(ovm, "ls") == 0


def test_a_service_that_cannot_write_its_log_is_told_of(machine):
    """B22: what only the service's own process meets arrives as a typed error, with its hint."""
    from ovm.service import launch

    machine.log_dir.touch()
    with pytest.raises(errors.FileError, match=r"dev/log cannot be created") as refused:
        launch.launch(machine)
    assert refused.value.hint.startswith(f"check {machine.log_dir}: it or one of its parents is not a directory")


def test_a_service_whose_lock_is_none_is_told_of(machine):
    """B22: the start ends with the error that names the lock."""
    from ovm.service import launch

    machine.service_lock.mkdir()
    with pytest.raises(errors.FileError, match="is a directory instead of a lock file") as refused:
        launch.launch(machine)
    assert refused.value.hint == f"remove {machine.service_lock}"


@pytest.mark.parametrize("what", ["directory", "link"])
def test_a_service_lock_that_is_none_is_named(machine, capfd, what):
    """B22: `ovm ls` and `status` tell of the machine all the same, and what would take the lock says what to do."""
    if what == "directory":
        machine.service_lock.mkdir()
    else:
        machine.service_lock.symlink_to("elsewhere")
    assert ovm("ls") == 0
    assert ovm("status", "dev") == 3
    capfd.readouterr()
    assert ovm("rm", "-y", "dev") == 1
    assert f"hint: remove {machine.service_lock}" in capfd.readouterr().err


@pytest.mark.parametrize("name", [machines.SERVICE_RECORD, machines.ENDED])
def test_a_record_that_is_a_directory_is_named(machine, name):
    """B22: it can be neither read nor replaced."""
    from ovm.registry import records

    path = machine.directory / name
    path.mkdir()
    assert machines.at_rest(machine).state == "stopped"
    with pytest.raises(errors.FileError, match=f"{name} cannot be written") as refused:
        records.save(path, records.Ended(at=1.0, reason="stopped"))
    assert refused.value.hint == f"remove {path}: it is a directory"
    assert leftovers(machine.directory) == []


@pytest.mark.parametrize("name", [machines.SERVICE_RECORD, machines.ENDED])
def test_a_record_that_is_a_link_is_replaced(machine, name):
    """B22: and what it led to stays."""
    from ovm.registry import records

    other = machine.directory / "other"
    other.write_text("kept")
    (machine.directory / name).symlink_to("other")
    records.save(machine.directory / name, records.Ended(at=1.0, reason="stopped"))
    assert not (machine.directory / name).is_symlink()
    assert other.read_text() == "kept"


def test_a_lock_is_held_by_one(short_path):
    """Also while others remove the file and make it again."""
    path = short_path / "lock"
    with locks.held(path, wait_s=0.0):
        fd = locks.open_lock(path)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
    with locks.held(path, wait_s=0.0):
        pass
