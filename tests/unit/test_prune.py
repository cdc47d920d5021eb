"""What a prune asks of podman and of the guest, in which order, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ovm import cli
from ovm.errors import GuestError
from ovm.guest.ssh import SSH
from ovm.machine import prune
from ovm.model.results import ExecResult, Pruned

REPORT = {
    "PodPruneReport": [{"Err": None, "Id": "p1"}],
    "ContainerPruneReports": [{"Id": "c1", "Size": 1000}, {"Id": "c2", "Size": 500}],
    "ImagePruneReports": [{"Id": "i1", "Size": 9_000_000}, {"Id": "i2", "Size": 7, "Err": "image is in use"}],
    "NetworkPruneReports": [{"Name": "n1", "Error": None}],
    "VolumePruneReports": None,
    "ReclaimedSpace": 9_001_500,
}


class Guest:
    """Both ends of a guest: its podman behind a socket, and commands over ssh; remembers what was asked, in order."""

    def __init__(self, answer: bytes = json.dumps(REPORT).encode(), status: str = "200 OK") -> None:
        self.asked: list[str] = []
        self.answer, self.status = answer, status
        self.trimmed = ExecResult(0, b"/var/lib/containers: 7.5 GiB (8050000000 bytes) trimmed\n", b"")

    async def exec(self, argv: list[str], *, timeout_s: float) -> ExecResult:
        assert timeout_s > 0
        self.asked.append(argv[-1])
        return self.trimmed if "fstrim" in argv[-1] else ExecResult(0, b"", b"")

    async def close(self) -> None:
        self.asked.append("close")

    @contextlib.asynccontextmanager
    async def podman(self, path: Path) -> AsyncIterator[Path]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.asked.append((await reader.readuntil(b"\r\n")).decode().strip())
            head = f"HTTP/1.1 {self.status}\r\ncontent-length: {len(self.answer)}\r\nconnection: close\r\n\r\n"
            writer.write(head.encode() + self.answer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_unix_server(serve, path)
        async with server:
            yield path

    async def prune(self, directory: Path, **more: bool) -> Pruned:
        async with self.podman(directory / "podman.sock") as socket:
            return await prune.prune(socket, self, **more)  # type: ignore[arg-type]


async def test_what_podman_removed(short_path: Path) -> None:
    """It is counted and summed by kind; what podman could not remove is told with its reason."""
    guest = Guest()
    done = await guest.prune(short_path)
    assert done.removed == {"pods": 1, "containers": 2, "images": 1, "networks": 1, "volumes": 0}
    assert done.freed_bytes == {"containers": 1500, "images": 9_000_000, "volumes": 0}
    assert done.failures == ("i2: image is in use",)
    assert done.trimmed_bytes == 8_050_000_000


@pytest.mark.parametrize(
    ("more", "query"),
    [
        ({}, "all=false&volumes=false"),
        ({"everything": True}, "all=true&volumes=false"),
        ({"volumes": True}, "all=false&volumes=true"),
    ],
)
async def test_no_more_is_asked_for_than_was_wanted(short_path: Path, more: dict[str, bool], query: str) -> None:
    """Room is made before podman is asked, and given to the host after."""
    guest = Guest()
    await guest.prune(short_path, **more)
    make_room, asked, trim = guest.asked
    assert "reserve give" in make_room
    assert asked == f"POST /v4.0.0/libpod/system/prune?{query} HTTP/1.1"
    assert trim.index("sync") < trim.index("fstrim") < trim.index("reserve take")


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (b'{"cause": "no", "message": "database is locked"}', "500 Internal Server Error", "database is locked"),
        (b"{", "200 OK", "is malformed"),
        (b'{"ImagePruneReports": 3}', "200 OK", "is malformed"),
    ],
)
async def test_a_podman_that_does_not(short_path: Path, answer: bytes, status: str, words: str) -> None:
    """Whatever it says instead is a GuestError."""
    with pytest.raises(GuestError, match=words):
        await Guest(answer, status).prune(short_path)


async def test_a_podman_that_is_not_there(short_path: Path) -> None:
    """So is silence."""
    with pytest.raises(GuestError, match="podman could not prune"):
        await prune.prune(short_path / "podman.sock", Guest())  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [b"", b"nothing\n"])
async def test_a_disk_that_cannot_be_trimmed(short_path: Path, said: bytes) -> None:
    """What podman has removed is removed all the same."""
    guest = Guest()
    guest.trimmed = ExecResult(0 if said else 1, said, b"fstrim: the discard operation is not supported\n")
    done = await guest.prune(short_path)
    assert done.trimmed_bytes is None
    assert done.removed["containers"] == 2


# --- the command


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, short_path: Path) -> Path:
    """A home of ovm's with one machine, and its sockets' directory."""
    monkeypatch.setenv("OVM_HOME", str(short_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    target = short_path / "home" / "machines" / "default" / "target"
    target.mkdir(parents=True)
    (target / "data.img").write_bytes(b"x" * 8192)
    return short_path / "home"


class Terminal(io.StringIO):
    """Where somebody types."""

    def isatty(self) -> bool:
        return True


def ovm(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of ``ovm --progress none prune ARGS``."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["--progress", "none", "prune", *args])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch, home: Path) -> Guest:
    """The machine as if it ran: what is asked of its gvproxy and of its guest is answered here."""
    from ovm import paths
    from ovm.cli import prune as verb

    guest = Guest()
    disk = paths.TargetPaths(home / "machines" / "default" / "target").data_disk

    async def found(name: str) -> verb._Machine:
        assert name == "default"
        return verb._Machine(home / "podman.sock", guest, disk)  # type: ignore[arg-type]

    async def pruned(podman_socket: Path, ssh: SSH, **more: bool) -> Pruned:
        assert podman_socket == home / "podman.sock"
        guest.asked.append(f"prune {dict(sorted(more.items()))}")
        disk.write_bytes(b"")
        return Pruned(
            removed={"pods": 0, "containers": 1, "images": 2, "networks": 0, "volumes": 0},
            freed_bytes={"containers": 0, "images": 3 << 20, "volumes": 0},
            trimmed_bytes=5,
            failures=("i2: in use",),
        )

    monkeypatch.setattr(verb, "_running", found)
    monkeypatch.setattr(prune, "prune", pruned)
    return guest


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.usefixtures("home")
def test_a_machine_that_does_not_run(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """It is an error that says how to start it; of one that was never made, which there are."""
    status, out, err = ovm(capsys, name, "--yes")
    assert (status, out) == (1, "")
    assert ("is not running" if name == "default" else "there is no machine called other") in err
    assert f"hint: {'start it: ovm start default' if name == 'default' else 'choose one of: default'}" in err


def test_without_a_terminal_it_must_be_told(capsys: pytest.CaptureFixture[str], running: Guest) -> None:
    """Nothing is removed that nobody has agreed to."""
    status, _, err = ovm(capsys)
    assert status == 2
    assert "--yes" in err
    assert running.asked == []


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_on_a_terminal_it_asks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, running: Guest, answer: str
) -> None:
    """It names what will go, and goes on if that is agreed to."""
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    status, out, err = ovm(capsys, "--volumes")
    assert "all unnamed images" in err
    assert "all volumes that no container uses, with their data" in err
    if answer == "y":
        assert status == 0
        assert running.asked == ["prune {'everything': False, 'volumes': True}", "close"]
        assert out.splitlines()[:2] == ["1 container", "2 images, 3.0 MiB"]
        assert "not removed: i2: in use" in err
    else:
        assert status == 130
        assert not [asked for asked in running.asked if asked.startswith("prune")]


def test_json(capsys: pytest.CaptureFixture[str], running: Guest) -> None:
    """One line for programs, with what the data disk takes up on the host before and after."""
    status, out, _ = ovm(capsys, "-y", "--all", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["removed"]["images"] == 2
    assert told["trimmed_bytes"] == 5
    assert told["host_bytes_before"] > told["host_bytes_after"] == 0
    assert running.asked == ["prune {'everything': True, 'volumes': False}", "close"]
