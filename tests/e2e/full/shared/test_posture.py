"""Who can reach what of a running machine from the host: its files, its sockets, its ports."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncssh
import pytest

import listeners
import ovm
import under
from ovm.guest.ssh import SSH, make_keys
from ovm.paths import KeyPaths, public
from processes import holders

pytestmark = [pytest.mark.full, pytest.mark.skipif(under.MAC, reason="it reads /proc, and needs another user")]

NOBODY = 65534
FOR_ALL = {"kernel", "initrd", "rootfs.btrfs", "versions.json", "digests.json", "gvproxy", "vfkit"}
"""Files without secrets, which whoever gets as far may read."""


def directories(vm: ovm.OVM) -> list[Path]:
    return [vm.options.target_dir, vm.options.socket_dir, vm.options.log_dir, vm.options.ssh_key_dir]


def helpers(vm: ovm.OVM) -> list[int]:
    """Processes that have a file of the machine open."""
    return sorted({pid for directory in directories(vm) for pid in holders(directory)})


async def test_every_file_and_socket_is_its_owners_alone(vm: ovm.OVM) -> None:
    """But for files without secrets, which nobody else may write to either."""
    for directory in directories(vm):
        found = [directory, *directory.rglob("*")]
        assert len(found) > 1
        for path in found:
            status = path.lstat()
            mode = stat.S_IMODE(status.st_mode)
            assert status.st_uid == os.geteuid(), path
            if path.is_symlink():  # whose mode says nothing
                assert path.readlink() == Path("net") / path.name
                continue
            if directory == vm.options.target_dir and (path == directory or path.name in FOR_ALL):
                assert mode & 0o022 == 0, path
            else:
                assert mode & 0o077 == 0, (path, oct(mode))
    for directory in (vm.options.socket_dir, vm.options.ssh_key_dir):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


async def test_ports_are_those_of_the_table(vm: ovm.OVM) -> None:
    """ssh's and, for it was asked for, podman's; on the loopback alone; besides what was exported or published."""
    ours = {(f.protocol, f.host_address, f.host_port) for f in vm.ports()}
    ways_in = {("tcp", "127.0.0.1", port) for port in (vm.info.ssh_port, vm.info.podman_port)}
    assert listeners.ports(helpers(vm)) == ways_in | ours


class Asked(asyncssh.SSHClient):
    """Answers whatever it is asked."""

    def __init__(self, password: str) -> None:
        self.password = password

    def password_auth_requested(self) -> str:
        return self.password

    def kbdint_auth_requested(self) -> str:
        return ""

    def kbdint_challenge_received(self, *_: object) -> list[str]:
        return [self.password]


async def test_password_logins_are_refused(vm: ovm.OVM) -> None:
    """sshd offers public keys and nothing else, to root and to anybody."""
    for user, password in (("root", ""), ("root", "root"), ("podman", "podman")):
        with pytest.raises(asyncssh.PermissionDenied):
            await asyncssh.connect(
                "127.0.0.1",
                vm.info.ssh_port,
                username=user,
                client_factory=functools.partial(Asked, password),
                known_hosts=None,
                client_keys=None,
                agent_path=None,
                preferred_auth=["password", "keyboard-interactive", "hostbased"],
                config=None,
            )
    assert await asyncssh.get_server_auth_methods("127.0.0.1", vm.info.ssh_port, "root", config=None) == ["publickey"]


async def test_knocking_on_sshs_port_keeps_nobody_out(vm: ovm.OVM) -> None:
    """A web page that asks for it again and again, or another user, does not make sshd refuse the manager."""
    for _ in range(40):
        reader, writer = await asyncio.open_connection("127.0.0.1", vm.info.ssh_port)
        writer.write(b"GET / HTTP/1.1\r\nHost: rebound.example\r\n\r\n")
        await reader.read()
        writer.close()
    client = SSH(vm.info.ssh_port, KeyPaths(vm.options.ssh_key_dir))
    assert (await client.exec(["echo", "let in"])).text == "let in"
    await client.close()


async def test_another_key_is_refused(vm: ovm.OVM, tmp_path: Path) -> None:
    """A key that is not the machine's opens nothing."""
    other = KeyPaths(tmp_path / "other")
    make_keys(other)
    for path in (KeyPaths(vm.options.ssh_key_dir).host_key, public(KeyPaths(vm.options.ssh_key_dir).host_key)):
        shutil.copy(path, other.directory)
    with pytest.raises(ovm.GuestError, match="rejected the ssh key"):
        await SSH(vm.info.ssh_port, other).connect()


async def test_a_guest_with_another_host_key_is_refused(vm: ovm.OVM, tmp_path: Path) -> None:
    """Whatever answers on ssh's port has to have the key that was made for this machine."""
    other = KeyPaths(tmp_path / "other")
    make_keys(other)
    with pytest.raises(ovm.HostKeyMismatch):
        await SSH(vm.info.ssh_port, other).connect()


SNOOP = """
import json, os, socket, sys
given = json.load(sys.stdin)
got = []
def attempt(name, do):
    try:
        do()
    except OSError:
        pass
    else:
        got.append(name)
for path, is_socket in given["paths"]:
    if is_socket:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            attempt(f"connect {path}", lambda: socket.socket(socket.AF_UNIX, kind).connect(path))
    else:
        attempt(f"read {path}", lambda: os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1))
        attempt(f"write {path}", lambda: open(path, "ab"))
        attempt(f"make {path}/x", lambda: open(path + "/x", "x"))
        attempt(f"remove {path}", lambda: os.rename(path, path + ".x"))
for pid in given["pids"]:
    for name in ("environ", "mem", "maps", "cwd", "root"):
        attempt(f"{name} of {pid}", lambda: os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
    attempt(f"files of {pid}", lambda: os.listdir(f"/proc/{pid}/fd"))
    attempt(f"signal {pid}", lambda: os.kill(pid, 0))
attempt("ssh's port", lambda: socket.create_connection(("127.0.0.1", given["ssh_port"]), 10))
print(json.dumps(got))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
async def test_another_user_reaches_nothing(vm: ovm.OVM) -> None:
    """No file but those without secrets, no socket, no process: even where the directories above can be passed."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("there is no Python here that another user may execute")
    paths = [path for directory in directories(vm) for path in (directory, *directory.rglob("*"))]
    assert sum(path.is_socket() for path in paths) >= 4
    given = {
        "paths": [(str(path), path.is_socket()) for path in paths],
        "pids": helpers(vm),
        "ssh_port": vm.info.ssh_port,
    }
    target = vm.options.target_dir
    with passable([target / "kernel", *directories(vm)]):
        snooped = await asyncio.to_thread(
            subprocess.run,
            [python, "-I", "-S", "-c", SNOOP],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
        )
    got = set(json.loads(snooped.stdout))
    without_secrets = {f"read {path}" for path in target.iterdir() if path.name in FOR_ALL}
    assert f"read {target / 'kernel'}" in got  # so it did get as far
    assert got - without_secrets == {"ssh's port"}  # where it needs the user's key


@contextmanager
def passable(paths: list[Path]) -> Iterator[None]:
    """Others may pass all that is above, whatever the tests' own directories are."""
    above = {parent: parent.stat().st_mode for path in paths for parent in path.parents}
    closed = {path: mode for path, mode in above.items() if not mode & 0o001}
    for path, mode in closed.items():
        path.chmod(stat.S_IMODE(mode) | 0o011)
    try:
        yield
    finally:
        for path, mode in closed.items():
            path.chmod(stat.S_IMODE(mode))


async def test_podmans_tcp_port_obeys_a_web_page(vm: ovm.OVM) -> None:
    """Why it is off where it was not asked for: no name, no origin, no type and nobody's rights are looked at."""
    order = json.dumps({"Name": "from-a-web-page"})
    lines = (
        "POST /v5.0.0/libpod/volumes/create HTTP/1.0",
        "Host: rebound.example",
        "Origin: http://evil.example",
        "Content-Type: text/plain",
        f"Content-Length: {len(order)}",
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", vm.info.podman_port)
    writer.write("\r\n".join((*lines, "", order)).encode())
    assert (await reader.readline()).split()[1] == b"201"
    writer.close()
    assert (await vm.exec(["podman", "volume", "rm", "from-a-web-page"])).text == "from-a-web-page"
