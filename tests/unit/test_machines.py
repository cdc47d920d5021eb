"""The machines of this host: what files and locks tell of them, with real files and real holders of locks."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from ovm import errors
from ovm.errors import HelperExited
from ovm.model.options import Options
from ovm.process import identity, lock
from ovm.registry import machines, records, removal
from ovm.registry.machines import Machine
from ovm.registry.records import Ended, ServiceRecord
from ovm.trust import locks

HOLDER = (
    "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
)
MIB = 1024 * 1024

Make = Callable[[str], Machine]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes machines in a home of their own, as ``create_ovm`` would: without settings."""
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))

    def make(name: str) -> Machine:
        machine = machines.of(name)
        machine.target.mkdir(parents=True)
        return machine

    return make


@contextlib.contextmanager
def held(path: Path) -> Iterator[int]:
    """Another process holds the lock in ``path``; tells its pid."""
    argv = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        try:
            yield process.pid
        finally:
            process.kill()


def dead() -> ServiceRecord:
    """The record of a service that was killed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    who = identity.of(process.pid)
    process.kill()
    process.communicate()
    assert who is not None
    return dataclasses.replace(ServiceRecord.ours(Path("/run")), pid=who.pid, started=who.started)


def data_disk(machine: Machine, mib: int) -> None:
    with machine.data_disk.open("wb") as file:
        file.truncate(mib * MIB)
        file.write(b"x" * 8192)


def test_no_machines(made):
    assert machines.names() == []
    with pytest.raises(errors.StateError, match="no machine called dev") as missing:
        machines.find("dev")
    assert missing.value.hint == "create it: ovm start dev"


def test_machines_are_directories_with_names(made):
    """Not what else may lie there: files, and what is being removed."""
    home = made("default").directory.parent
    made("b.2_x-y")
    (home / "notes").write_text("")
    (home / ".ovm-removed.old").mkdir()
    assert machines.names() == ["b.2_x-y", "default"]
    assert machines.find("default") == Machine("default", home / "default")
    with pytest.raises(errors.StateError) as missing:
        machines.find("notes")
    assert missing.value.hint == "choose one of: b.2_x-y, default"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", ".a", "a b", "ä", "a\n", "a" * 33])
def test_what_no_machine_is_called(name):
    with pytest.raises(errors.OptionError, match="not a valid machine name"):
        machines.of(name)


def test_the_defaults_are_those_of_the_options():
    options = {field: Options.__dataclass_fields__[field] for field in ("cpus", "memory_mib", "data_disk_mib")}
    assert options["cpus"].default_factory() == machines.DEFAULT_CPUS
    assert options["memory_mib"].default == machines.DEFAULT_MEMORY_MIB
    assert options["data_disk_mib"].default == machines.DEFAULT_DISK_MIB


def test_a_machine_that_was_never_started(made):
    rest = machines.at_rest(made("dev"))
    assert (rest.held_by, rest.pid, rest.state, rest.why) == ("nobody", None, "stopped", "")
    assert (rest.last, rest.last_up, rest.disk_bytes, rest.disk_size_bytes) == (None, None, None, None)


def test_a_machine_that_was_stopped(made):
    machine = made("dev")
    data_disk(machine, 300)
    os.utime(machine.data_disk, (5, 1000))
    ended = Ended(at=1001.0, reason="failed", code="guest-refused", message="no")
    records.save(machine.ended_record, ended)
    rest = machines.at_rest(machine)
    assert (rest.state, rest.last, rest.last_up, rest.disk_size_bytes) == ("stopped", ended, 1000, 300 * MIB)
    assert rest.disk_bytes is not None
    assert 8192 <= rest.disk_bytes < MIB


def test_a_machine_that_died_keeps_the_whole_error(made):
    """What the record of a failed run tells is the error, with its evidence: each line printable and not too long."""
    machine = made("dev")
    error = HelperExited(
        "qemu ended unexpectedly", stage="running", exit_reason="exit status 1", log_tail=("KVM", "no"), hint="read it"
    )
    records.save(machine.ended_record, Ended.failed(error))
    last = machines.at_rest(machine).last
    assert last is not None
    assert last.error == error.as_dict()
    hostile = {"at": 1.0, "reason": "failed", "code": "x", "log_tail": ["\x1b[2J", 7, "y" * 2000], "hint": "\u202e"}
    machine.ended_record.write_text(json.dumps(hostile))
    last = machines.at_rest(machine).last
    assert last is not None
    assert last.error is not None
    assert (last.log_tail[:2], len(last.log_tail[2]), last.hint) == (["·[2J", "7"], 1000, "·")


def test_an_end_without_a_failure_has_no_error():
    """A run that was stopped has no error, whatever else is in its record."""
    assert Ended(at=1.0, reason="stopped", message="x").error is None


@pytest.mark.parametrize(
    "content",
    [b'{"at": "\xff', b"", b"[]", b"null", b'{"at": 1.0}', b'{"at": "x", "reason": "failed"}', b"[" * 100_000],
)
def test_a_damaged_record_is_none(made, content):
    machine = made("dev")
    machine.ended_record.write_bytes(content)
    assert machines.at_rest(machine).last is None


def test_what_another_version_has_written_down_besides_is_left_out(made):
    machine = made("dev")
    machine.ended_record.write_text('{"at": 1.0, "reason": "failed", "message": {"en": "no"}, "more": 1}')
    assert machines.at_rest(machine).last == Ended(at=1.0, reason="failed")


def test_a_machine_of_a_service(made):
    machine = made("dev")
    with held(machine.service_lock) as pid:
        rest = machines.at_rest(machine)
        assert (rest.held_by, rest.pid, rest.state, rest.why) == ("service", None, "alive", "")
        records.save(machine.service_record, dataclasses.replace(ServiceRecord.ours(Path("/run")), pid=pid))
        rest = machines.at_rest(machine)
        assert (rest.held_by, rest.pid, rest.state, rest.why) == ("service", pid, "alive", "")
        machines.refuse_others(machine)
        with pytest.raises(errors.InUseError) as refused:
            removal.remove(machine)
        assert refused.value.hint == "stop it first: ovm stop dev"
    assert machine.target.is_dir()


async def test_a_machine_of_another_program(made):
    machine = made("dev")
    async with lock.hold([machine.target], wait_s=0):
        rest = machines.at_rest(machine)
        assert (rest.held_by, rest.pid, rest.state, rest.why) == ("program", os.getpid(), "alive", "")
        with pytest.raises(errors.InUseError, match=f"in use by process {os.getpid()}"):
            machines.refuse_others(machine)
        with pytest.raises(errors.InUseError, match="in use by process"):
            removal.remove(machine)
    assert machines.at_rest(machine).held_by == "nobody"
    machines.refuse_others(machine)


def test_a_program_that_left_no_name(made):
    """Its disk was full, for one."""
    machine = made("dev")
    with held(machine.target / "ovm.lock"):
        rest = machines.at_rest(machine)
        assert (rest.held_by, rest.pid, rest.state) == ("program", None, "alive")
        with pytest.raises(errors.InUseError, match="in use by another program"):
            machines.refuse_others(machine)


def test_a_service_that_was_killed(made):
    machine, record = made("dev"), dead()
    records.save(machine.service_record, record)
    rest = machines.at_rest(machine)
    why = f"its service (process {record.pid}) was killed"
    assert (rest.held_by, rest.state, rest.why) == ("nobody", "crashed", why)
    removal.remove(machine)
    assert machines.names() == []


@pytest.mark.parametrize("change", [removal.remove, removal.forget_memory])
@pytest.mark.parametrize("name", ["service.lock", "target/ovm.lock"])
def test_a_look_at_a_lock_is_waited_for(made, monkeypatch, change, name):
    """A machine is removed, or its saved state deleted, although ``ovm ls`` looks at its locks at that moment."""
    machine = made("dev")
    looks = look_at(machine.directory / name)
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: looks.close()))
    change(machine)
    assert looks.closed


def test_a_look_without_end_is_not_waited_for(made, monkeypatch):
    """A process that keeps looking at a lock delays a removal by ``LOOK_WAIT_S`` at most."""
    machine = made("dev")
    monkeypatch.setattr(locks, "LOOK_WAIT_S", 0.0)
    with look_at(machine.service_lock), pytest.raises(errors.InUseError, match="is being started"):
        removal.remove(machine)
    assert machine.target.is_dir()


def look_at(path: Path) -> IO[bytes]:
    """Hold the lock in ``path`` as a process does that looks whether somebody owns it, until it is closed."""
    looking = path.open("ab")
    fcntl.flock(looking, fcntl.LOCK_SH)
    return looking


def test_a_host_that_went_down(made):
    machine = made("dev")
    records.save(machine.service_record, dataclasses.replace(dead(), boot_id="another"))
    rest = machines.at_rest(machine)
    assert (rest.held_by, rest.state, rest.why) == ("nobody", "crashed", "the host went down while it ran")


def test_what_a_killed_service_has_left_is_no_machine_that_runs(made):
    """For the moment until its helpers are gone, which hold the lock that it named itself in."""
    machine, record = made("dev"), dead()
    records.save(machine.service_record, record)
    manager = {"pid": record.pid, "started": record.started, "program": "x"}
    note = {"boot_id": "", "manager": manager, "command": "", "since": 0.0, "brief": False, "roster": None}
    (machine.target / "ovm.lock").write_bytes(json.dumps(note).encode())
    with held(machine.target / "ovm.lock"):
        rest = machines.at_rest(machine)
        assert (rest.held_by, rest.pid, rest.state) == ("program", None, "crashed")
        assert "was killed" in rest.why
        machines.refuse_others(machine)
        with pytest.raises(errors.InUseError, match="have not ended yet"):
            removal.remove(machine)
        machine.service_record.unlink()
        assert machines.at_rest(machine).why == f"the program that held it (process {record.pid}) was killed"


def test_a_machine_is_removed_whole(made):
    """Its sockets, too; no other machine is touched."""
    machine, other = made("dev"), made("other")
    data_disk(machine, 1)
    data_disk(other, 1)
    for one in (machine, other):
        one.sockets.directory.mkdir(parents=True)
        one.sockets.podman.touch()
    leftover = machine.directory.with_name(".ovm-removed.dev")
    leftover.mkdir()
    (leftover / "data.img").touch()
    removal.remove(machine)
    assert machines.names() == ["other"]
    assert sorted(path.name for path in machine.directory.parent.iterdir()) == [".settings.lock", "other"]
    assert not machine.sockets.directory.exists()
    assert other.sockets.podman.exists()
    assert other.data_disk.exists()


def test_a_machine_that_cannot_be_removed(made, tmp_path):
    """A link is followed to no disk that somebody else put there."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    machine = machines.of("dev")
    machine.directory.parent.mkdir(parents=True)
    machine.directory.symlink_to(elsewhere)
    with pytest.raises(errors.FileError, match="symbolic link"):
        removal.remove(machine)
    assert machines.names() == ["dev"]
    assert list(elsewhere.iterdir()) == []


def test_settings_are_written_whole_and_for_their_user_alone(made):
    machine = machines.of("dev")
    assert machine.settings_text() == ""
    machine.write_settings("cpus = 2\n")
    assert machine.settings_path.stat().st_mode & 0o777 == 0o600
    assert machine.directory.stat().st_mode & 0o777 == 0o700
    assert (machine.settings().cpus, list(machine.directory.iterdir())) == (2, [machine.settings_path])
    with pytest.raises(errors.SettingsError, match=r"machine\.toml:1: "):
        machine.write_settings("cpus = 0\n")
    assert machine.settings_text() == "cpus = 2\n"


def test_a_data_disk_only_grows(made):
    machine = made("dev")
    machine.write_settings('disk = "1G"\n')
    data_disk(machine, 1024)
    machine.write_settings('disk = "2G"\n')
    machine.write_settings('disk = "1G"\n')
    with pytest.raises(errors.OptionError, match="has 1024M and cannot shrink"):
        machine.write_settings('disk = "1023M"\n')
    assert machine.settings().disk == 1024


def test_settings_that_cannot_be_read(made):
    machine = made("dev")
    machine.settings_path.write_bytes(b"\xff")
    with pytest.raises(errors.FileError, match=r"machine\.toml cannot be read"):
        machine.settings()
    machine.settings_path.unlink()
    machine.settings_path.mkdir()
    with pytest.raises(errors.FileError, match=r"machine\.toml cannot be read"):
        machine.settings()
    with pytest.raises(errors.FileError, match=r"machine\.toml cannot be read"):
        machine.write_settings("")


def test_what_a_restart_would_change(made):
    machine = made("dev")
    machine.write_settings("cpus = 2\n")
    started = machine.settings()
    assert machines.restart_needed(machine, started) == []
    machine.write_settings('cpus = 3\nports = ["1:2"]\nautostart = true\nmemory = "1G"\n')
    assert machines.restart_needed(machine, started) == ["cpus", "memory", "ports"]
    machine.settings_path.write_text("cpus = ")
    assert machines.restart_needed(machine, started) == []
