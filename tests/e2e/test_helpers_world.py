"""What helper processes see of their user: next to nothing of the environment, and nothing of the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import processes
import tiny
from ovm.process import child

pytestmark = [pytest.mark.tiny, pytest.mark.skipif(sys.platform != "linux", reason="it looks at processes in /proc")]

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "SSH_AUTH_SOCK": "/run/agent.sock",
    "HTTPS_PROXY": "http://user:password@proxy:3128",
    "LD_PRELOAD_OF_MINE": "x",
    "PYTHONSTARTUP": "/home/someone/startup.py",
    "GODEBUG": "http2debug=1",
}
MANAGER = Path(__file__).with_name("manager.py")
ON_TERMINAL = 'exec "$@" <"$0" >"$0" 2>&1'
"""A terminal becomes that of the session whose leader is the first to open it."""
INTERRUPT = b"\x03"
"""What Ctrl-C sends; the terminal makes SIGINT of it."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """What the kernel tells of one."""

    name: str
    environment: dict[str, str]
    umask: str
    stdin: str
    group: int

    @classmethod
    def of(cls, pid: int) -> Process:
        where = Path(f"/proc/{pid}")
        environment = where.joinpath("environ").read_text().split("\0")
        status = dict(line.split(":\t", 1) for line in where.joinpath("status").read_text().splitlines())
        return cls(
            name=Path(processes.command(pid).split(" ")[0]).name,
            environment=dict(entry.split("=", 1) for entry in environment if "=" in entry),
            umask=status["Umask"],
            stdin=str((where / "fd/0").readlink()),
            group=os.getpgid(pid),
        )


def helpers(machines: tiny.Machines, *, manager: int) -> dict[str, Process]:
    """Those of the one machine that runs, children of children too, by their program's name."""
    pids = set(processes.holders(machines.root)) - {manager}
    found = {process.name: process for process in map(Process.of, pids)}
    assert len(found) == len(pids)
    expected = {Path(sys.executable).name, "gvproxy"}  # the guard is a Python
    expected |= {"qemu-system"} if machines.hypervisor == "qemu" else {"vfkit", "qemu-system", "vhost-device-vsock"}
    assert {name.rpartition("-")[0] if name.startswith("qemu-system-") else name for name in found} == expected
    return found


async def test_helpers_see_nothing_of_their_user(machines: tiny.Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever breaks into one finds no secrets in it, and what it makes is its user's alone."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for name in child._PASSED_ON:
        monkeypatch.setenv(name, os.environ.get(name, "C.UTF-8" if name.startswith("L") else "/tmp"))
    m = await machines()
    async with m.ovm:
        found = helpers(machines, manager=os.getpid())
    for name, process in found.items():
        assert process.environment == {kept: os.environ[kept] for kept in child._PASSED_ON}, name
        assert (process.umask, process.stdin) == ("0077", "/dev/null"), name
        assert process.group != os.getpgrp(), name
    assert len({process.group for process in found.values()}) == 1


async def test_ctrl_c_is_the_managers_alone(machines: tiny.Machines) -> None:
    """The whole foreground group of a terminal gets it; the helpers are in another, so the guest can be shut down."""
    options = machines.options()
    terminal, users_end = os.openpty()
    argv = [sys.executable, os.fspath(MANAGER), json.dumps(options)]
    manager = await asyncio.create_subprocess_exec(
        "sh", "-c", ON_TERMINAL, os.ttyname(users_end), *argv, start_new_session=True
    )
    said = Terminal(terminal)
    try:
        async with asyncio.timeout(120):
            await said.until("ready\r\n")
            assert os.tcgetpgrp(terminal) == manager.pid
            for name, process in helpers(machines, manager=manager.pid).items():
                assert (process.group != manager.pid, process.stdin) == (True, "/dev/null"), name
            os.close(users_end)
            os.write(terminal, INTERRUPT)
            await said.until("")
            assert await manager.wait() == -signal.SIGINT
    finally:
        with contextlib.suppress(ProcessLookupError):
            manager.kill()
        await manager.wait()
        os.close(terminal)
    assert "KeyboardInterrupt" in said.text
    logs = Path(options["log_dir"])
    assert "the power button was pressed" in (logs / "console.log").read_text(errors="replace")
    log = (logs / f"{machines.hypervisor}.log").read_text()
    assert "captured" not in log  # vfkit's word for a signal
    assert "terminating on signal" not in log  # QEMU's
    assert await machines.leftovers() == []


class Terminal:
    """What a program writes to its terminal."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.text = descriptor, ""

    async def until(self, words: str) -> None:
        """Until it has written ``words``; until the last one that has the terminal open is gone, if those are none."""
        while not words or words not in self.text:
            try:
                content = await asyncio.to_thread(os.read, self.descriptor, 4096)
            except OSError:  # on Linux the end of it is an error
                content = b""
            if not content:
                assert not words, self.text
                return
            self.text += content.decode(errors="replace")
