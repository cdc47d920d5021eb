"""Root in the guest has gvproxy make and remove files (B11, B12): nowhere but in gvproxy's own directory."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from networks import started
from ovm.errors import FileError
from ovm.network.forwarding import Network
from ovm.network.gvproxy import lay_out
from ovm.paths import LOCK, SocketPaths
from ovm.process import confine
from ovm.process.child import Group, process_group
from ovm.wire import http
from ovm.wire.error import WireError

confined = pytest.mark.skipif(not confine.available(), reason="this host confines nothing")

NAMES = [
    LOCK,
    *(name for name, value in vars(SocketPaths).items() if isinstance(value, property) and name != "gvproxy"),
    "share",
    "vfkit-1f-2.sock",
]
"""What lies in socket_dir, or can: by the name of the property that leads to it, or by its own."""


def beside(directory: Path, name: str) -> Path:
    """The file of socket_dir that one of ``NAMES`` stands for."""
    found = getattr(SocketPaths(directory), name, directory / name)
    return found if isinstance(found, Path) else found(0)


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Group]:
    """A process group with its guard."""
    async with process_group((), log_path=tmp_path / "guard.log") as group:
        yield group


@pytest.fixture
async def network(group: Group, gvproxy: Path, short_path: Path, tmp_path: Path) -> AsyncIterator[Network]:
    """A running gvproxy."""
    sockets = SocketPaths(short_path)
    async with started(group, gvproxy, sockets, tmp_path / "gvproxy.log", wire="qemu") as running:
        yield running


async def asked(sockets: SocketPaths, order: str, path: str | Path) -> bool:
    """Whether gvproxy's API does what root in the guest asks of it."""
    body = {"local": str(path), "remote": "tcp://192.168.127.2:22", "protocol": "unix"}
    async with http.connect(sockets.network_api) as api:
        try:
            await api.post(f"/services/forwarder/{order}", body)
        except WireError:
            return False
    return True


@confined
@pytest.mark.parametrize("name", NAMES)
async def test_nothing_beside_its_own_directory_is_made_or_removed(
    network: Network, short_path: Path, name: str
) -> None:
    """B11, B12: no lock, no socket of the service, the manager or a helper, whether there is one or not."""
    sockets, path = SocketPaths(short_path), beside(short_path, name)
    ways = (path, sockets.gvproxy / ".." / path.name, f"../{path.name}", path.name)
    if not path.is_symlink():
        for way in ways[:3]:
            assert not await asked(sockets, "expose", way), way
            assert not path.exists()
        path.write_text("precious")
    before = path.lstat()
    for order in ("expose", "unexpose"):
        for way in ways[:3]:
            assert not await asked(sockets, order, way), way
            assert path.lstat() == before
    assert network.child.running


@confined
async def test_its_own_directory_stays(network: Network, short_path: Path) -> None:
    """B11: gvproxy removes what lies where its socket is to be, but no directory."""
    sockets = SocketPaths(short_path)
    assert not await asked(sockets, "expose", sockets.gvproxy)
    assert sockets.gvproxy.is_dir()
    assert network.child.running


async def test_its_own_directory_is_emptied(network: Network, short_path: Path) -> None:
    """B11: a name that the guest chose is in the way of no start, nor of another gvproxy after this one died."""
    sockets = SocketPaths(short_path)
    assert await asked(sockets, "expose", sockets.gvproxy / "ovm.lock")
    assert sockets.gvproxy / "ovm.lock" in sockets.stale()
    await network.child.end(grace_s=0)
    await network.begin_again()
    assert {path.name for path in sockets.left_by_gvproxy()} == {"network.sock", "net.sock"}


async def test_the_layout_of_an_earlier_version_is_in_nobodys_way(
    group: Group, gvproxy: Path, short_path: Path, tmp_path: Path
) -> None:
    """B11: sockets that a killed version before this one left, where there are links now, are replaced."""
    sockets = SocketPaths(short_path)
    links = (sockets.network_api, sockets.network_card, sockets.podman)
    for link in links:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(link))
    async with started(group, gvproxy, sockets, tmp_path / "gvproxy.log", wire="qemu") as network:
        await network.expose_socket(sockets.made_by_gvproxy(sockets.podman), 58125)
        for link in links:
            assert link.readlink() == Path("net") / link.name
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(link))


def test_its_own_directory_is_its_own(short_path: Path) -> None:
    """B11: a file of the user's that lies there is not given to root in the guest; nor is a link followed."""
    sockets = SocketPaths(short_path)
    sockets.gvproxy.mkdir()
    (sockets.gvproxy / "precious").write_text("precious")
    with pytest.raises(FileError, match="net holds precious"):
        lay_out(sockets)
    assert (sockets.gvproxy / "precious").read_text() == "precious"
    sockets.gvproxy.rename(short_path / "elsewhere")
    sockets.gvproxy.symlink_to("elsewhere")
    with pytest.raises(FileError, match="net is a symbolic link"):
        lay_out(sockets)
