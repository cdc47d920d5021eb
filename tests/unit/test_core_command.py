"""What an ovm-core guest is told: run by a real shell, in a root of the test's own."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from ovm.errors import OptionError
from ovm.guest.bootconfig import BootConfig
from ovm.guest.ovm_core import COMMAND_MAX_BYTES, serve, shell_command

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPyR ovm"
HOST_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk=\n-----END OPENSSH PRIVATE KEY-----\n"
HOSTILE = '/it\'s $(touch pwned) `id` "x" \\n;|&*?\t%s'


def config(**more) -> BootConfig:
    given = {"authorized_key": KEY, "host_key": HOST_KEY, "host_key_public": KEY, "hostname": "box", "machine_id": "0"}
    return BootConfig(**given | more)


@pytest.fixture(params=["sh", "busybox"])
def run(request, tmp_path):
    """Runs a command as the guest's initrd would, with another place for the writable root; returns that root."""
    shell = ["sh", "-c"] if request.param == "sh" else [shutil.which("busybox"), "sh", "-c"]
    if shell[0] is None:
        pytest.skip("busybox is not installed")

    def run(command: bytes) -> Path:
        assert command.endswith(b"\0")
        assert b"\0" not in command[:-1]
        text = command[:-1].decode().replace("/mnt/overlay", str(tmp_path / "root"))
        done = subprocess.run([*shell, text], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert [path.name for path in tmp_path.iterdir()] == ["root"]
        return tmp_path / "root"

    return run


def test_everything_is_put_in_its_place(run):
    """Keys for root alone, the host's name and zone, mounts, and what says that the guest is ready."""
    mounts = (("share0", "/Users", False), ("share1", "/with space", True))
    root = run(shell_command(config(timezone="Europe/Berlin", mounts=mounts, channel_key="secret")))
    authorized = root / "root/.ssh/authorized_keys"
    host_key = root / "etc/ssh/ssh_host_ed25519_key"
    assert authorized.read_text() == KEY + "\n"
    assert host_key.read_text() == HOST_KEY
    assert host_key.with_name("ssh_host_ed25519_key.pub").read_text() == KEY + "\n"
    assert authorized.stat().st_mode & 0o777 == host_key.stat().st_mode & 0o777 == 0o600
    assert authorized.parent.stat().st_mode & 0o777 == 0o700
    assert (root / "etc/hostname").read_text() == "box\n"
    assert (root / "etc/localtime").readlink() == Path("/usr/share/zoneinfo/Europe/Berlin")
    assert (root / "etc/timezone").read_text() == "Europe/Berlin\n"
    assert (root / "etc/fstab").read_text().splitlines() == [
        "share0 /Users virtiofs rw,nofail 0 0",
        "share1 /with\\040space virtiofs ro,nofail 0 0",
    ]
    ready = root / "opt/ready.command"
    assert "socat - VSOCK-CONNECT:2:1026" in ready.read_text()
    assert ready.stat().st_mode & 0o077 == 0  # it may have the key to the manager's ear
    asked = "up=3.5; read() { :; }; socat() { cat; }; "
    said = subprocess.run(["sh", "-c", asked + ready.read_text()], capture_output=True, text=True, check=True)
    assert said.stdout == "key secret\nready 3.5\n"


def test_what_the_guest_has_is_kept(run, tmp_path):
    """Keys and mounts of the image stay; ours come behind."""
    for name in ("root/.ssh/authorized_keys", "etc/fstab"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True)
        path.write_text("theirs\n")
    root = run(shell_command(config(mounts=(("share0", "/a", False),))))
    assert (root / "root/.ssh/authorized_keys").read_text() == f"theirs\n{KEY}\n"
    assert (root / "etc/fstab").read_text().startswith("theirs\nshare0 ")


def test_nothing_given_is_run(run):
    """Paths are data, whatever they hold."""
    root = run(shell_command(config(mounts=(("share0", HOSTILE, False),))))
    (line,) = (root / "etc/fstab").read_text().splitlines()
    assert line.split(" ")[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\") == HOSTILE


def test_more_than_the_guest_reads_is_refused():
    """It reads once; the rest would be lost, and a half of a line would be run."""
    folders = tuple((f"share{n}", f"/folder/number/{n}", False) for n in range(40))
    with pytest.raises(OptionError, match=f"{COMMAND_MAX_BYTES} bytes"):
        shell_command(config(mounts=folders))


@pytest.mark.parametrize("more", [{"environment": {"A": "b"}}, {"ca_certificates": {"a.crt": b"x"}}])
def test_what_it_cannot_be_told_is_refused(more):
    """Silence would be a lie."""
    with pytest.raises(OptionError, match="ovm-core"):
        shell_command(config(**more))


async def test_each_boot_is_told(short_path):
    """Whoever connects gets the whole command in one piece, and it is noticed; several connections are fine."""
    asked: list[None] = []
    path = short_path / "command.sock"
    async with serve(path, b"echo hello\0", lambda: asked.append(None)):
        assert path.stat().st_mode & 0o777 == 0o600
        for _ in range(2):
            reader, writer = await asyncio.open_unix_connection(path)
            assert await reader.read(COMMAND_MAX_BYTES) == b"echo hello\0"
            writer.close()
        _, hanging = await asyncio.open_unix_connection(path)
        while len(asked) < 3:
            await asyncio.sleep(0.01)
    assert not path.exists()
    hanging.close()
