"""Every name on disk, and the kernel's limit on a socket's path."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from ovm import paths
from ovm.errors import SocketPathError
from ovm.paths import SOCKET_PATH_MAX_BYTES, KeyPaths, SocketPaths, TargetPaths


@pytest.mark.parametrize("path", [TargetPaths(Path("/t")), SocketPaths(Path("/s")), KeyPaths(Path("/k"))])
def test_every_name_is_in_the_list(path):
    """Each file and socket the code can name stands in the list at the top of the module."""
    names = [name for name, value in vars(type(path)).items() if isinstance(value, property)]
    assert names
    for name in names:
        assert re.search(rf"\b{re.escape(getattr(path, name).name)}\b", paths.__doc__ or ""), name


def directory_of(length: int) -> Path:
    """A path of that many bytes."""
    return Path("/" + "x" * (length - 1))


def test_the_longest_socket_fits_exactly():
    """A directory one byte too long is refused, one that just fits is not."""
    fits = SOCKET_PATH_MAX_BYTES - len("/virtiofs-99.sock")
    paths.check_socket_paths(directory_of(fits))
    with pytest.raises(SocketPathError) as caught:
        paths.check_socket_paths(directory_of(fits + 1))
    assert f"at most {fits} bytes" in caught.value.hint
    assert "virtiofs-99.sock" in caught.value.message
    own = SocketPaths(directory_of(fits))
    for link in (own.network_api, own.network_card, own.podman):
        assert len(str(own.made_by_gvproxy(link))) <= SOCKET_PATH_MAX_BYTES


def test_a_paths_length_is_counted_in_bytes():
    """Letters of several bytes count as the kernel counts them."""
    with pytest.raises(SocketPathError):
        paths.check_socket_paths(directory_of(46).with_name("ü" * 45))


def test_the_limit_is_the_kernels(short_path):
    """A socket whose path has the allowed length can be bound, one byte more cannot."""
    longest = short_path / ("x" * (SOCKET_PATH_MAX_BYTES - len(str(short_path)) - 1))
    with socket.socket(socket.AF_UNIX) as good, socket.socket(socket.AF_UNIX) as bad:
        good.bind(str(longest))
        with pytest.raises(OSError, match="too long"):
            bad.bind(str(longest) + "x")


def test_stale_names_are_ours_alone(short_path):
    """What a start clears away are names of ours, broken links among them, and nobody else's."""
    sockets = SocketPaths(short_path)
    ours = [sockets.network_api, sockets.network_card, sockets.podman, sockets.boot_initrd]
    ours += [sockets.share(0), sockets.share(12)]
    for path in ours:
        path.touch()
    sockets.ready.symlink_to("/nowhere")
    sockets.gvproxy.mkdir()
    with socket.socket(socket.AF_UNIX) as chosen_by_the_guest:
        chosen_by_the_guest.bind(str(sockets.gvproxy / "chosen"))
        ours.append(sockets.gvproxy / "chosen")
    (sockets.gvproxy / "a file").touch()
    for name in ("ovm.lock", "other.sock", "virtiofs-mine.sock", "virtiofs-0.sock.kept", "data.img"):
        (short_path / name).touch()
    assert set(sockets.stale()) == {*ours, sockets.ready}


def test_a_link_in_place_of_gvproxys_directory_is_not_followed(short_path):
    """What lies behind it is somebody else's."""
    (short_path / "other").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_path / "other" / "socket"))
    sockets = SocketPaths(short_path)
    sockets.gvproxy.symlink_to("other")
    assert sockets.left_by_gvproxy() == []


def test_nothing_is_stale_where_nothing_is(tmp_path):
    """A directory that is empty, or not there, has nothing to clear."""
    assert SocketPaths(tmp_path).stale() == []
    assert SocketPaths(tmp_path / "missing").stale() == []


def test_ovm_home_holds_everything(monkeypatch, tmp_path):
    """With $OVM_HOME, images, machines and the cache lie below it."""
    monkeypatch.setenv("OVM_HOME", str(tmp_path))
    for path in (paths.home(), paths.images_dir(), paths.machine_dir("x"), paths.cache_dir()):
        assert path.is_relative_to(tmp_path)


def test_homes_without_ovm_home_are_the_users(monkeypatch):
    """Without $OVM_HOME, the user's own data and cache directories are used, which differ."""
    monkeypatch.delenv("OVM_HOME", raising=False)
    assert paths.home().name == paths.cache_dir().name == "ovm"
    assert paths.home() != paths.cache_dir()


def test_two_homes_share_no_sockets(monkeypatch, tmp_path):
    """Machines called "default" in two homes have different socket directories, both short enough."""
    found = set()
    for home in ("a", "b"):
        monkeypatch.setenv("OVM_HOME", str(tmp_path / home))
        found.add(directory := paths.default_socket_dir("default"))
        paths.check_socket_paths(directory)
    monkeypatch.delenv("OVM_HOME")
    found.add(paths.default_socket_dir("default"))
    assert len(found) == 3


def test_sockets_have_a_place_without_a_runtime_directory(monkeypatch):
    """Without $XDG_RUNTIME_DIR the socket directory is the user's own below the temporary one."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("OVM_HOME", raising=False)
    import os

    assert paths.default_socket_dir("m").parent.name == f"ovm-{os.getuid()}"


def test_a_key_and_its_public_half_lie_together():
    """The public half is the private key's name with .pub."""
    keys = KeyPaths(Path("/k"))
    assert paths.public(keys.user_key) == Path("/k/ovm.pub")
    assert paths.public(keys.host_key) == Path("/k/host_key.pub")
