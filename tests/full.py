"""The words in which the full guest's tests are written."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import subprocess
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import guests
import ovm
import under

MachineOptions = Callable[..., dict[str, Any]]
"""Makes the options of a machine with directories of its own."""


@dataclass
class Authority:
    """A certificate authority of the tests' own, and a certificate for the host as guests call it."""

    ca: Path
    certificate: Path
    key: Path


CLIENT_TIMEOUT_S = 180.0
BUSYBOX = Path("/bin/busybox")
HOST_PROGRAMS = ("/usr/bin/getent", "/usr/bin/perl")
"""A static busybox can neither look names up nor serve UDP; these can, with the host's own libraries."""
APPLETS = "cat cut date echo false grep head httpd id ls mkdir nc rm seq sh sleep sync test touch tr true wc"
BUSYBOX_IMAGE = "localhost/busybox:latest"


def options(base: Path, image: Path, gvproxy: Path, vfkit: Path | None = None, **more: object) -> dict[str, Any]:
    """Options of a machine with directories below ``base``; for ``under.create``."""
    origins = {
        "gvproxy": gvproxy,
        "kernel": image / "kernel",
        "initrd": image / "initrd",
        "rootfs": image / "rootfs.btrfs",
    }
    if vfkit is not None:
        origins["vfkit"] = vfkit
    return {
        "origin_path": origins,
        "versions": dict.fromkeys(origins, "1"),
        "mounts": [],
        "target_dir": base / "target",
        "socket_dir": base / "socket",
        "log_dir": base / "log",
        "ssh_key_dir": base / "ssh",
        "data_disk_mib": 8192,
        "memory_mib": 1536,
        "cpus": 2,
        "kernel_cmdline": under.QUICKER,
        **more,
    }


@dataclass
class Ran:
    """What a client printed, and how it ended."""

    status: int
    out: str
    err: str


async def ran(
    argv: Sequence[str], environment: Mapping[str, str], *, stdin: bytes = b"", check: bool, timeout: float
) -> Ran:
    """Run a client to its end, or kill it after ``timeout`` seconds; with ``check``, its status must be 0."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        async with asyncio.timeout(timeout):
            out, err = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    ended = Ran(process.returncode, out.decode(errors="replace").strip(), err.decode(errors="replace").strip())
    if check:
        assert ended.status == 0, f"{' '.join(argv)}: {ended.err or ended.out}"
    return ended


class Podman:
    """The ``podman --remote`` that is installed, with a home of its own."""

    def __init__(self, machine: ovm.OVM, home: Path) -> None:
        self.machine = machine
        self._program = under.program("podman")
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_RUNTIME_DIR": str(home),
            "TMPDIR": str(home),
        }

    async def __call__(
        self, *arguments: str | Path, stdin: bytes = b"", check: bool = True, timeout: float = CLIENT_TIMEOUT_S
    ) -> Ran:
        argv = [self._program, "--remote", "--url", self.machine.info.docker_host, *map(str, arguments)]
        return await ran(argv, self._environment, stdin=stdin, check=check, timeout=timeout)


def busybox_tar(path: Path) -> Path:
    """A root file system of busybox, getent and perl; at ``path`` unless it was made elsewhere."""
    if given := guests.made("busybox.tar"):
        return given
    with tarfile.open(path, "w") as tar:
        for name in ("bin", "tmp", "etc", "data"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o777
            tar.addfile(entry)
        tar.add(BUSYBOX, "bin/busybox")
        linked = subprocess.run(["ldd", *HOST_PROGRAMS], check=True, capture_output=True, text=True).stdout
        for file in {*HOST_PROGRAMS, *re.findall(r"\s(/\S+) \(", linked)}:
            tar.add(Path(file).resolve(), file.lstrip("/"))
        for applet in APPLETS.split():
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
        passwd = tarfile.TarInfo("etc/passwd")
        content = b"root:x:0:0:root:/:/bin/sh\n"
        passwd.size = len(content)
        tar.addfile(passwd, io.BytesIO(content))
    return path


@contextlib.asynccontextmanager
async def running(podman: Podman, *arguments: str) -> AsyncIterator[str]:
    """A container started with ``podman run -d`` and removed on the way out."""
    identity = (await podman("run", "-d", *arguments)).out
    try:
        yield identity
    finally:
        await podman("rm", "-f", "-t", "0", identity)


async def eventually(
    check: Callable[[], Awaitable[object]], *, timeout_s: float = 60.0, interval_s: float = 0.2
) -> None:
    """Until ``check``, an async function, returns something true."""
    async with asyncio.timeout(timeout_s):
        while not await check():
            await asyncio.sleep(interval_s)


async def fetch(port: int, address: str = "127.0.0.1") -> str:
    """What a web server says at /hello; empty if there is none."""
    try:
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(address, port)
            with contextlib.closing(writer):
                writer.write(b"GET /hello HTTP/1.0\r\n\r\n")
                answer = await reader.read()
    except (OSError, TimeoutError):
        return ""
    return answer.decode().rpartition("\r\n\r\n")[2].strip()
