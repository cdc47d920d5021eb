"""Rows B1, B4, B5, B6: another user lays out the ways to a machine before its owner comes; every command is tried.

Each layout is a place that is attacked, the level of the way to it, and a trick. Nothing of the owner's is made,
changed or removed by way of it, and nothing that the other user put there is believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ovm import cli, paths
from ovm.cli import doctor
from ovm.errors import OVMError, UntrustedError
from ovm.machine import prepare
from ovm.model.options import Options
from ovm.registry import machines, removal
from ovm.service import launch
from ovm.service.run import _listening
from ovm.testing import sharing
from ovm.wire import http, plain

FORGED = "FORGED"
"""What nobody may show: the other user's service says it."""
NAME = "dev"
COMMANDS = (
    ("init", NAME),
    ("ls",),
    ("status", NAME),
    ("status", NAME, "--json"),
    ("info", NAME),
    ("env", NAME),
    ("events", NAME),
    ("port", "ls", NAME),
    ("pause", NAME),
    ("prune", NAME, "-y"),
    ("ssh", NAME, "true"),
    ("config", "set", "cpus", "2", "--machine", NAME),
    ("stop", NAME),
    ("stop", NAME, "--force"),
    ("rm", "-y", NAME),
)
GROUP_OF_OTHERS = 1
"""Of daemons: it is no user's own."""


@dataclass(frozen=True)
class Place:
    """Something of the owner's that lies where others can write: its name, and the way to it, root first."""

    name: str
    levels: int


PLACES = (Place("tmp", 3), Place("runtime", 4), Place("home", 3))


@dataclass
class Scene:
    """One layout: ``way`` leads to the directory of sockets, or of the machine."""

    root: Path
    bait: Path
    theirs: Path
    way: list[Path]
    stranger: object


Trick = Callable[[Scene, int], None]


def their_directory(scene: Scene, level: int) -> None:
    scene.stranger.does(scene.way[level].mkdir)
    scene.stranger.does(furnish, scene.way[level:])


def a_link_to_a_directory_of_ours(scene: Scene, level: int) -> None:
    scene.stranger.does(scene.way[level].symlink_to, scene.bait)


def a_link_to_their_directory(scene: Scene, level: int) -> None:
    rest = [scene.theirs.joinpath(*path.parts[len(scene.way[level].parts) :]) for path in scene.way[level:]]
    scene.stranger.does(scene.theirs.mkdir)
    scene.stranger.does(furnish, rest)
    scene.stranger.does(scene.way[level].symlink_to, scene.theirs)


def ours_that_everybody_can_write_to(scene: Scene, level: int) -> None:
    scene.way[level].mkdir()
    scene.way[level].chmod(0o777)
    scene.stranger.does(furnish, scene.way[level:])


def ours_that_a_group_can_write_to(scene: Scene, level: int) -> None:
    scene.way[level].mkdir()
    os.chown(scene.way[level], 0, GROUP_OF_OTHERS)
    scene.way[level].chmod(0o775)


TRICKS = (
    their_directory,
    a_link_to_a_directory_of_ours,
    a_link_to_their_directory,
    ours_that_everybody_can_write_to,
    ours_that_a_group_can_write_to,
)
LAYOUTS = [(place, level, trick) for place in PLACES for level in range(place.levels) for trick in TRICKS]


def furnish(way: list[Path]) -> None:
    """What the other user puts there: directories, settings, and records that lead to a service of theirs."""
    for path in way[1:]:
        path.mkdir(exist_ok=True)
    end = way[-1]
    (end / "machine.toml").write_text(f'hostname = "{FORGED}"\n')
    (end / "service.json").write_text(json.dumps({"pid": 1, "socket_dir": str(end), "boot_id": FORGED}))
    (end / "target").mkdir(exist_ok=True)
    (end / "keep").write_text("theirs")


def answer_for_ever(listener: socket.socket) -> None:
    """A service of theirs that says something else than ours would."""
    status = {"version": FORGED, "api": 1, "pid": 1, "name": NAME, "state": FORGED, "step": FORGED}
    body = json.dumps(status).encode()
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


def everything_below(directory: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Each name below it: its mode, owner, time of change and content."""
    found = {}
    for path in [directory, *directory.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_uid, status.st_mtime_ns, content)
    return found


@pytest.fixture
def lay_out(short_path: Path, tmp_path: Path, stranger, monkeypatch) -> Callable[..., Scene]:
    """Makes a scene in which everything but the attacked place is private."""

    def make(place: Place) -> Scene:
        root = short_path / "root"
        root.mkdir()
        root.chmod(0o1777)
        short_path.chmod(0o755)
        bait = short_path / "bait"
        bait.mkdir(mode=0o700)
        (bait / "precious").write_text("data")
        (bait / NAME).mkdir()
        (bait / NAME / "precious").write_text("data")
        private = tmp_path / "private"
        private.mkdir(mode=0o700)
        monkeypatch.setenv("OVM_HOME", str(root / "home" if place.name == "home" else private / "home"))
        for variable in ("DOCKER_CONFIG", "XDG_CONFIG_HOME", "HOME"):
            monkeypatch.setenv(variable, str(private))
        monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
        if place.name == "tmp":
            monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
            monkeypatch.setattr(tempfile, "tempdir", str(root))
        else:
            run = root / "run" if place.name == "runtime" else private / "run"
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(run))
        end = paths.machine_dir(NAME) if place.name == "home" else paths.default_socket_dir(NAME)
        way = [path for path in (*reversed(end.parents), end) if path.is_relative_to(root) and path != root]
        assert len(way) == place.levels
        return Scene(root, bait, root / "theirs", way, stranger)

    return make


@contextlib.contextmanager
def their_service(scene: Scene) -> Iterator[None]:
    """Whatever they have laid out, their service listens at the end of it, if they can have it there."""
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.closing(listener):
        path = scene.way[-1] / "ovm.sock"
        try:
            scene.stranger.does(path.touch)
        except OSError:  # they cannot
            yield
            return
        path.unlink()
        listener.bind(str(path))
        os.chown(path, scene.stranger.uid, scene.stranger.uid)
        with scene.stranger.doing(listen_and_answer, listener):
            yield


def listen_and_answer(listener: socket.socket) -> None:
    listener.listen()
    answer_for_ever(listener)


def ovm(*arguments: str) -> int:
    return cli._status(cli.Ui(), arguments)


@pytest.mark.parametrize(
    ("place", "level", "trick"),
    LAYOUTS,
    ids=[f"{place.name}-{level}-{trick.__name__}" for place, level, trick in LAYOUTS],
)
def test_what_another_user_has_laid_out_is_not_used(place, level, trick, lay_out, stranger, capsys):
    """B1, B4, B5, B6: no command makes, changes, removes or believes anything there, whatever becomes of it."""
    scene = lay_out(place)
    for path in scene.way[:level]:  # the owner's own, where others may put things
        path.mkdir()
        path.chmod(0o1777)
    trick(scene, level)
    with their_service(scene):
        before = everything_below(scene.bait), everything_below(scene.root)
        for command in COMMANDS:
            status = ovm(*command)
            told = capsys.readouterr()
            assert FORGED not in told.out + told.err, command
            if command[0] == "env":
                assert told.out == ""
            if command[0] not in {"init", "ls", "config", "rm", "stop"}:
                assert status != 0, command
        if level < place.levels - 1:  # above the machine's own directory
            looked_at = doctor.check_home() if place.name == "home" else doctor.check_socket_dir("linux")
            assert looked_at.status == ("ok" if place.name == "home" and level else "missing")
        refuse_all(scene)
        assert (everything_below(scene.bait), everything_below(scene.root)) == before


def refuse_all(scene: Scene) -> None:
    """What uses a directory, or a socket in it, below the command line."""
    end = scene.way[-1]
    elsewhere = Path(tempfile.mkdtemp(dir=scene.root.parent))
    for option in ("target_dir", "socket_dir", "log_dir", "ssh_key_dir"):
        chosen = {name: elsewhere / name for name in ("target_dir", "socket_dir", "log_dir", "ssh_key_dir")}
        with pytest.raises(UntrustedError):
            prepare.make_directories(options_with(chosen | {option: end}))
    with pytest.raises(UntrustedError), _listening(end / "ovm.sock"):
        pass
    with pytest.raises(UntrustedError), plain.request(end / "ovm.sock", "GET", "/v1/status"):
        pass


def options_with(directories: dict[str, Path]) -> Options:
    return Options.of(
        {
            "origin_path": {"gvproxy": "/g", "kernel": "/k", "initrd": "/i", "rootfs": "/r"},
            "versions": {"gvproxy": "1", "kernel": "1", "initrd": "1", "rootfs": "1"},
            **directories,
        }
    )


@pytest.mark.parametrize("place", PLACES[:2], ids=lambda place: place.name)
def test_no_service_is_started_there(place, lay_out, monkeypatch, tmp_path):
    """B5: `ovm start` ends with the reason, as its service tells it."""
    scene = lay_out(place)
    a_link_to_a_directory_of_ours(scene, 0)
    monkeypatch.setenv("TMPDIR", str(scene.root))
    machine = machines.of(NAME)
    machine.write_settings("")
    before = everything_below(scene.bait)
    with pytest.raises(UntrustedError, match="is a link"):
        launch.launch(machine)
    assert everything_below(scene.bait) == before


def test_tests_of_a_project_share_no_machine_there(lay_out):
    """The pytest plugin makes no lock in a home that another user has laid out."""
    scene = lay_out(PLACES[2])
    their_directory(scene, 0)
    before = everything_below(scene.root)
    with pytest.raises(UntrustedError), sharing.sharing(NAME, template=NAME, keep=False, stop=True):
        pass
    with pytest.raises(UntrustedError):
        sharing.stop_unused(NAME)
    assert everything_below(scene.root) == before


async def test_no_byte_is_sent_to_a_server_of_another_user(short_path, stranger):
    """B4: in a directory of ours there may be a socket of theirs, if we once let them: it is looked at who listens."""
    directory = short_path / "ours"
    directory.mkdir(mode=0o700)
    path = directory / "ovm.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        with stranger.doing(listen_and_answer, listener):
            with pytest.raises(UntrustedError, match="another user"):
                retry_until_it_listens(lambda: open_plainly(path))
            async with http.connect(path) as client:
                with pytest.raises(UntrustedError, match="another user"):
                    await client.text("/v1/status")
                with pytest.raises(UntrustedError, match="another user"):
                    async with client.lines("GET", "/v1/events"):
                        pass


def open_plainly(path: Path) -> None:
    with plain.request(path, "GET", "/v1/status"):
        pass


def retry_until_it_listens(attempt: Callable[[], None]) -> None:
    while True:
        try:
            attempt()
        except UntrustedError:
            raise
        except (OVMError, plain.WireError):
            continue


def test_what_is_exchanged_while_a_machine_is_removed_is_not_removed(lay_out, stranger, monkeypatch):
    """B1: they exchange links and directories on the way to the sockets as fast as they can; our data stays."""
    scene = lay_out(PLACES[0])
    first = scene.way[0]

    def exchange() -> None:
        first.symlink_to(scene.bait)
        first.unlink()
        first.mkdir()
        first.rmdir()

    before = everything_below(scene.bait)
    with stranger.doing(exchange):
        for _ in range(100):
            machines.of(NAME).write_settings("")
            removal.remove(machines.of(NAME))
    assert everything_below(scene.bait) == before
