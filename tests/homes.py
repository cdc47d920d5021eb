"""A home of ovm's own for tests: with a tiny image, the command run in it as a person would, and what it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import tiny
from ovm.image.build import host_arch

DEADLINE_S = 180.0


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def make_image(directory: Path, guest: tiny.Guest) -> Path:
    """An image of the tiny guest, as ``ovm image build`` would describe it."""
    directory.mkdir(parents=True)
    files = {}
    for role, name, path in (
        ("kernel", "kernel", guest.kernel),
        ("initrd", "initrd", guest.initrd),
        ("rootfs", "rootfs.btrfs", guest.rootfs),
    ):
        (directory / name).symlink_to(path)
        content = path.read_bytes()
        files[role] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    described = {"format": 1, "guest": "bare", "arch": host_arch(), "files": files}
    (directory / "image.json").write_text(json.dumps(described))
    return directory


class Home:
    """Machines below one ``$OVM_HOME``."""

    def __init__(self, root: Path, guest: tiny.Guest | Path, gvproxy: Path, source: Path | None = None) -> None:
        """``guest`` is the tiny one, or the directory of an image."""
        self.root = root
        image = root / "home" / "images" / f"default-{host_arch()}"
        if isinstance(guest, Path):
            image.parent.mkdir(parents=True)
            image.symlink_to(guest)
        else:
            make_image(image, guest)
        self.environment = {
            "PATH": f"{gvproxy.parent}:{os.environ['PATH']}",
            "HOME": str(root / "user"),
            "OVM_HOME": str(root / "home"),
            "XDG_RUNTIME_DIR": str(root / "run"),
            "TERM": "dumb",
        }
        if source is not None:
            self.environment["PYTHONPATH"] = str(source)
        (root / "user").mkdir()
        (root / "run").mkdir(mode=0o700)

    def machine(self, name: str) -> Path:
        return self.root / "home" / "machines" / name

    def init(self, name: str = "default", *words: str, **settings: Any) -> None:
        """Write its settings; ``words`` order the tiny guest's behaviour."""
        told = {"cpus": 1, "memory": 256, "disk": 256, "kernel_cmdline": " ".join(f"tiny.{word}" for word in words)}
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in (told | settings).items())
        self.machine(name).mkdir(parents=True)
        (self.machine(name) / "machine.toml").write_text(text)

    async def begin(self, *args: str, **how: Any) -> asyncio.subprocess.Process:
        """``ovm ARGS``, still running."""
        argv = [sys.executable, "-P", "-m", "ovm", *args]
        return await asyncio.create_subprocess_exec(
            *argv, env=self.environment, cwd=self.root, **({"stdin": DEVNULL, "stdout": PIPE, "stderr": PIPE} | how)
        )

    async def run(self, *args: str) -> Done:
        """``ovm ARGS``, to its end."""
        process = await self.begin(*args)
        try:
            async with asyncio.timeout(DEADLINE_S):
                out, err = await process.communicate()
        except BaseException:
            process.kill()
            raise
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())

    async def good(self, *args: str) -> Done:
        """The same, which must succeed."""
        done = await self.run(*args)
        assert done.status == 0, done
        return done

    async def status(self, name: str = "default") -> dict[str, Any]:
        told: dict[str, Any] = (await self.run("status", name, "--json")).json
        return told

    def log(self, name: str = "default", log: str = "service") -> str:
        return (self.machine(name) / "log" / f"{log}.log").read_text(errors="replace")

    def left(self) -> list[str]:
        """Processes that hold a file of a machine."""
        held = {*processes.holders(self.root / "home"), *processes.holders(self.root / "run")}
        return [f"{pid} {processes.command(pid)}" for pid in held]

    async def nothing_runs(self) -> None:
        """Waits for it, 10 s."""
        for _ in range(100):
            if not self.left():
                break
            await asyncio.sleep(0.1)
        assert self.left() == []

    async def nothing_left(self) -> None:
        """The same, and no socket lies there."""
        await self.nothing_runs()
        assert [path for path in (self.root / "run").rglob("*") if path.is_socket()] == []

    def end(self) -> None:
        """Whatever became of the test."""
        for pid in {*processes.holders(self.root / "home")}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
