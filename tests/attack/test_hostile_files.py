"""Row B14: something odd lies where a file of a machine belongs; no command waits for it, or fails for others."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

import hostile
from ovm import cli, errors, paths
from ovm.disks import data, saved_state
from ovm.disks import records as disk_records
from ovm.hypervisors import accel
from ovm.integrations import docker_context, ssh_config
from ovm.process import lock, orphans
from ovm.registry import images as registry
from ovm.registry import machines, records, removal, settings
from ovm.registry.machines import Machine
from ovm.registry.records import Ended, ServiceRecord
from ovm.testing import LOCK as TESTS_LOCK
from ovm.testing import sharing

MANY = 100
ODD_VALUES = ["9" * 5000, "0x" + "f" * 5000, "[" * 5000, "{a=" * 5000, "a." * 5000, "inf", "\n=", "\0"]


@pytest.fixture(autouse=True)
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OVM_HOME", str(short_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path / "run"))
    monkeypatch.setenv("DOCKER_CONFIG", str(short_path / "docker"))
    return short_path / "home"


def made(name: str) -> Machine:
    machine = machines.of(name)
    for directory in (machine.target, machine.log_dir, machine.keys.user_key.parent):
        directory.mkdir(parents=True)
    return machine


@pytest.fixture
def machine() -> Machine:
    return made("dev")


# every reader


Read = Callable[[Machine], object]
READERS: dict[str, tuple[str, Read]] = {
    "settings": (machines.SETTINGS, lambda machine: machine.settings()),
    "service record": (machines.SERVICE_RECORD, lambda machine: records.read(machine.service_record, ServiceRecord)),
    "last end": (machines.ENDED, lambda machine: records.read(machine.ended_record, Ended)),
    "service lock": (machines.SERVICE_LOCK, machines.at_rest),
    "owner's lock": (f"target/{paths.LOCK}", lambda machine: (machines.at_rest(machine), lock.owner(machine.target))),
    "owner's lock, taken": (f"target/{paths.LOCK}", removal.forget_memory),
    "machine": (f"target/{paths.MACHINE}", lambda machine: data.load_machine(paths.TargetPaths(machine.target))),
    "versions": (f"target/{paths.VERSIONS}", lambda machine: disk_records.load(paths.TargetPaths(machine.target))),
    "digests": (f"target/{paths.DIGESTS}", lambda machine: disk_records.load(paths.TargetPaths(machine.target))),
    "suspended": (f"target/{paths.SUSPENDED}", lambda machine: saved_state.load(paths.TargetPaths(machine.target))),
    "data disk": (f"target/{paths.DATA_DISK}", machines.at_rest),
    "helpers": ("helpers.json", lambda machine: orphans.reclaim(machine.directory / "helpers.json")),
    "tests' lock": (TESTS_LOCK, sharing.stop_if_unused),
    "image": (registry.IMAGE_MANIFEST, lambda machine: registry.read_manifest(machine.directory)),
    "host key": ("ssh/host_key.pub", lambda _machine: ssh_config.write("dev", port=1)),
    "known hosts": (ssh_config.KNOWN_HOSTS, lambda _machine: ssh_config.write("dev", port=1)),
    "accelerator": ("answer.json", lambda machine: accel.recall(machine.directory / "answer.json")),
    "lock of settings": (f"../{machines.SETTINGS_LOCK}", lambda machine: machine.write_settings("cpus = 2")),
}
SHAPES = hostile.NO_FILES | {f"JSON: {name}": put for name, put in hostile.ODD_JSON.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_or_fails_otherwise_than_by_an_error_of_ours(machine, reader, shape):
    """B14: whatever lies there, the answer is a result or an OVMError, soon and in little memory."""
    name, read = READERS[reader]
    SHAPES[shape](machine.directory / name)
    with hostile.bounded():
        with contextlib.suppress(errors.OVMError, saved_state.Unfit):
            read(machine)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hostile_context_of_docker_is_an_error_of_ours(short_path, shape):
    """B14: the same for files that other programs write."""
    docker_context.add("dev", Path("/run/a"))
    (path,) = (short_path / "docker").rglob("meta.json")
    path.unlink()
    SHAPES[shape](path)
    with hostile.bounded():
        for action in (lambda: docker_context.add("dev", Path("/run/b")), lambda: docker_context.remove("dev")):
            with contextlib.suppress(errors.OVMError):
                action()


@pytest.mark.parametrize("shape", hostile.ODD_TOML)
def test_odd_settings_are_refused_with_a_reason_of_one_line(machine, shape):
    """B14: however deep, long or large what they say is; a message is short, and printable."""
    hostile.ODD_TOML[shape](machine.settings_path)
    with hostile.bounded(), pytest.raises(errors.InputError) as refused:
        machine.settings()
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 1000
    with hostile.bounded(), pytest.raises(errors.OVMError):
        machine.change_settings(lambda text: settings.changed(text, "cpus", "9" * 5000, machine.settings_path))


@pytest.mark.parametrize(
    "value", ["9" * 5000, "0x" + "f" * 5000, "[" * 5000, "{a=" * 5000, "a." * 5000, "inf", "\n=", "\0"]
)
@pytest.mark.parametrize("key", ["cpus", "memory", "ports", "mounts", "environment", "proxy", "pause_on_sleep"])
def test_an_odd_value_on_a_command_line_is_refused(key, value):
    """B14: by `ovm config set`, as it would be in the file."""
    with hostile.bounded(), pytest.raises(errors.SettingsError) as refused:
        settings.changed("", key, value)
    assert refused.value.message.isprintable()


# ovm ls


def rows(capfd: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """What ``ovm ls --json`` prints, by the machines' names."""
    with hostile.bounded(), pytest.raises(SystemExit) as ended:
        cli.main(["ls", "--json"])
    assert not ended.value.code
    return {row["name"]: row for row in json.loads(capfd.readouterr().out)}


def lay_out(home: Path) -> tuple[set[str], set[str], set[str]]:
    """A hundred hostile machines and ten others: those whose settings are odd, all hostile ones, the others."""
    odd_settings = {
        f"settings-{number}": put for number, put in enumerate([*hostile.NO_FILES.values(), *hostile.ODD_TOML.values()])
    }
    for name, put in odd_settings.items():
        put(made(name).settings_path)
    elsewhere = [
        machines.SERVICE_LOCK,
        machines.SERVICE_RECORD,
        machines.ENDED,
        *(f"target/{name}" for name in (paths.LOCK, paths.DATA_DISK, paths.SUSPENDED)),
    ]
    files = zip(cycle(elsewhere), cycle(SHAPES.values()), strict=False)
    others = [f"files-{number}" for number in range(MANY - len(odd_settings))]
    for name, (file, put) in zip(others, files, strict=False):
        put(made(name).directory / file)
    normal = [f"ok-{number}" for number in range(10)]
    for number, name in enumerate(normal, 1):
        made(name).write_settings(f"cpus = {number}\n")
    directory = home / "machines"
    (directory / "a-file").touch()
    (directory / "a-loop").symlink_to("a-loop")
    (directory / "gone").symlink_to("nowhere")
    (directory / "a-device").symlink_to("/dev/zero")
    os.mkfifo(directory / "a-pipe")
    for odd in ("\x1b[2J", "two\nlines", "-rf", ".hidden", "n" * 200, "\udcff", "\u202e"):
        (directory / odd).mkdir()
    return set(odd_settings), set(odd_settings) | set(others), set(normal)


def test_a_hundred_hostile_machines_leave_the_others_rows_right(home, capfd):
    """B14: `ovm ls` gives each machine its row; one whose settings cannot be read has the reason in it."""
    odd_settings, bad, normal = lay_out(home)
    found = rows(capfd)
    assert len(bad) == MANY
    assert set(found) == bad | normal
    assert [found[f"ok-{number}"]["cpus"] for number in range(10)] == list(range(1, 11))
    assert {(found[name]["state"], found[name]["why"]) for name in normal} == {("stopped", "")}
    assert {name for name in odd_settings if not found[name]["why"]} == set()
    for row in found.values():
        assert row["why"].isprintable()
        assert len(row["why"]) <= 1000


def test_a_list_for_people_has_no_escapes(home, capfd):
    """B14: of names, reasons and records."""
    lay_out(home)
    with hostile.bounded(), pytest.raises(SystemExit) as ended:
        cli.main(["ls"])
    assert not ended.value.code
    told = capfd.readouterr()
    assert all(line.isprintable() for line in (told.out + told.err).split("\n"))


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (Path.touch, "is not a directory"),
        (lambda path: path.symlink_to("machines"), "leads through more than 40 links"),
    ],
)
def test_machines_that_cannot_be_listed_are_an_error(home, capfd, put, words):
    """B14: a typed one, that names their directory."""
    home.mkdir()
    put(home / "machines")
    with pytest.raises(SystemExit) as ended:
        cli.main(["ls"])
    assert ended.value.code == 1
    assert f"{home / 'machines'} {words}" in capfd.readouterr().err


@pytest.mark.parametrize("shape", ["pipe", "socket", "loop", "directory", "zeros"])
def test_a_machine_with_an_odd_lock_is_not_held(machine, shape):
    """B14: what is no regular file is no lock that somebody holds."""
    hostile.NO_FILES[shape](machine.service_lock)
    hostile.NO_FILES[shape](machine.target / paths.LOCK)
    with hostile.bounded():
        assert machines.at_rest(machine).held_by == "nobody"
