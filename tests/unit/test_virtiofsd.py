"""virtiofsd's command line, and its socket."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ovm.errors import FileError, HelperError
from ovm.hypervisors import Share, virtiofsd
from ovm.hypervisors.virtiofsd import Virtiofsd, command

C, OLD, NEW = (7, 2, 22), (1, 10), (1, 13, 2)


def share(folder: str, socket_path: Path = Path("/s/virtiofs-0.sock"), *, read_only: bool = False) -> Share:
    return Share(tag="share0", host_path=Path(folder), read_only=read_only, socket=socket_path)


@pytest.mark.parametrize(
    ("version", "folder", "read_only", "expected"),
    [
        (C, "/src", False, ["-o", "source=/src", "-o", "cache=auto"]),
        (C, "/src", True, ["-o", "source=/src", "-o", "cache=auto"]),
        (C, "/a,b\\c", False, ["-o", "source=/a\\,b\\\\c", "-o", "cache=auto"]),
        (OLD, "/a,b", False, ["--shared-dir", "/a,b", "--cache=auto"]),
        (OLD, "/src", True, ["--shared-dir", "/src", "--cache=auto"]),
        (NEW, "/src", True, ["--shared-dir", "/src", "--cache=auto", "--readonly"]),
        (NEW, "/src", False, ["--shared-dir", "/src", "--cache=auto"]),
    ],
)
def test_the_command_line_of_each_flavour(version, folder, read_only, expected):
    """Each virtiofsd is told the folder in its own way, and read-only where it can hold to that."""
    daemon = Virtiofsd(Path("/usr/libexec/virtiofsd"), version)
    argv = command(daemon, share(folder, read_only=read_only), fd=7)
    assert argv == ["/usr/libexec/virtiofsd", "--fd=7", *expected]


@pytest.mark.parametrize(("version", "is_c", "enforces"), [(C, True, False), (OLD, False, False), (NEW, False, True)])
def test_what_each_flavour_can(version, is_c, enforces):
    """The old C one and the two ages of the Rust one are told apart by version."""
    daemon = Virtiofsd(Path("v"), version)
    assert (daemon.is_c, daemon.enforces_read_only) == (is_c, enforces)


async def test_it_inherits_a_socket_that_can_be_connected_to(group, short_path, tmp_path):
    """The socket is there at once, private, and the program gets it as the file its command line names."""
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\nls -l /proc/$$/fd/${1#--fd=}\nexec sleep 60\n")
    program.chmod(0o755)
    shared = share(str(tmp_path), short_path / "virtiofs-0.sock")
    log = tmp_path / "virtiofsd-0.log"
    async with virtiofsd.start(group, Virtiofsd(program, NEW), shared, log) as child:
        assert child.name == "virtiofsd-0"
        assert shared.socket.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(shared.socket))
    assert not child.running


async def test_a_program_that_is_none_is_told(group, short_path, tmp_path):
    """A virtiofsd that cannot be run is a HelperError."""
    daemon = Virtiofsd(tmp_path / "missing", NEW)
    with pytest.raises(HelperError, match="virtiofsd-0 cannot be started"):
        async with virtiofsd.start(group, daemon, share("/", short_path / "s"), tmp_path / "virtiofsd-0.log"):
            pass


async def test_a_socket_that_cannot_be_made_is_told(group, short_path, tmp_path):
    """A socket's place that is taken is a FileError that names it."""
    (short_path / "s").touch()
    with pytest.raises(FileError, match="cannot be created: Address already in use"):
        async with virtiofsd.start(group, Virtiofsd(Path("v"), NEW), share("/", short_path / "s"), tmp_path / "l.log"):
            pass
