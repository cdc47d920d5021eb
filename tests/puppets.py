"""Real services without a machine: the command, the process, its lock, records and socket, and a puppet inside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Any

import processes
from homes import Done
from ovm.registry import machines
from ovm.registry.machines import Machine
from ovm.service.client import Service

DEADLINE_S = 30.0
AGAIN_S = 0.01


class Stage:
    """An ``$OVM_HOME`` with one machine, ``dev``, whose services hold puppets."""

    def __init__(self, root: Path, monkeypatch: Any) -> None:
        self.root = root
        for part in ("user", "run", "image"):
            (root / part).mkdir(mode=0o700)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(root / "user"),
            "OVM_HOME": str(root / "home"),
            "XDG_RUNTIME_DIR": str(root / "run"),
            "TERM": "dumb",
            "PYTHONPATH": str(Path(__file__).parent / "doubles" / "puppet"),
            "OVM_PUPPET": "1",
        }
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        self.machine: Machine = machines.of("dev")
        self.orders = self.machine.directory / "orders"
        self.orders.mkdir(parents=True)
        self.machine.directory.chmod(0o700)
        self.machine.settings_path.write_text(f"image = {json.dumps(str(root / 'image'))}\n")

    def order(self, *names: str) -> None:
        """Have the puppet do so from now on."""
        for name in names:
            (self.orders / name).touch()

    def revoke(self, *names: str) -> None:
        """No more."""
        for name in names:
            (self.orders / name).unlink()

    async def reached(self, order: str) -> None:
        """Until the puppet came to where that order counts."""
        await self.until((self.orders / f"reached-{order}").exists)
        (self.orders / f"reached-{order}").unlink()

    async def until(self, holds: Any) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            assert time.monotonic() < deadline
            await asyncio.sleep(AGAIN_S)

    async def begin(self, *args: str) -> asyncio.subprocess.Process:
        """``ovm ARGS``, still running."""
        argv = [sys.executable, "-P", "-m", "ovm", *args]
        return await asyncio.create_subprocess_exec(
            *argv, env=self.environment, cwd=self.root, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
        )

    async def end_of(self, process: asyncio.subprocess.Process) -> Done:
        try:
            async with asyncio.timeout(DEADLINE_S):
                out, err = await process.communicate()
        except BaseException:
            process.kill()
            raise
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())

    async def run(self, *args: str) -> Done:
        """``ovm ARGS``, to its end."""
        return await self.end_of(await self.begin(*args))

    async def up(self) -> None:
        """Start it."""
        done = await self.run("start", "dev")
        assert done.status == 0, done

    @property
    def pid(self) -> int:
        """The process of the service, by its own record."""
        return int(json.loads(self.machine.service_record.read_text())["pid"])

    @property
    def service(self) -> Service:
        return Service("dev", self.machine.service_socket)

    def is_held(self) -> bool:
        return machines.at_rest(self.machine).held_by == "service"

    def kill(self) -> None:
        """SIGKILL the service, and wait for its end."""
        os.kill(pid := self.pid, signal.SIGKILL)
        deadline = time.monotonic() + DEADLINE_S
        while processes.command(pid) not in {"", processes.GONE}:
            assert time.monotonic() < deadline
            time.sleep(AGAIN_S)

    def log(self) -> str:
        return (self.machine.log_dir / "service.log").read_text(errors="replace")

    def end(self) -> None:
        """Whatever became of the test."""
        for pid in processes.holders(self.root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
