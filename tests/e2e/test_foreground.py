"""``ovm start --foreground``: a machine that lives as long as the command, and ends as it is asked to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

import homes
import processes
import tiny
from ovm.service.holder import SAME_SIGNAL_S

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(sys.platform != "linux", reason="the tiny image is one for QEMU"),
]


class Command:
    """``ovm start --foreground``, read line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.err = ""

    async def says(self, words: str) -> None:
        """Waits until it has said so on stderr."""
        assert self.process.stderr is not None
        async with asyncio.timeout(homes.DEADLINE_S):
            while words not in self.err:
                line = await self.process.stderr.readline()
                assert line, self.err
                self.err += line.decode()

    async def ends(self) -> tuple[int, str]:
        """Its status and its stdout."""
        async with asyncio.timeout(homes.DEADLINE_S):
            out, err = await self.process.communicate()
        self.err += err.decode()
        assert "Traceback" not in self.err
        return self.process.returncode or 0, out.decode()


Begin = Callable[..., Awaitable[Command]]


@pytest.fixture
async def home(tiny_guest: tiny.Guest, gvproxy: Path, short_path: Path) -> AsyncIterator[homes.Home]:
    """Whatever happens in it, nothing is left."""
    made = homes.Home(short_path, tiny_guest, gvproxy)
    try:
        yield made
        await made.nothing_left()
    finally:
        made.end()


@pytest.fixture
def begin(home: homes.Home) -> Begin:
    async def started(*words: str, arguments: tuple[str, ...] = ()) -> Command:
        home.init("default", *words)
        return Command(await home.begin("start", "--foreground", *arguments))

    return started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_shuts_the_guest_down(home: homes.Home, begin: Begin, number: signal.Signals) -> None:
    """Twice in one breath is once: wrappers pass on what the terminal has sent already."""
    command = await begin()
    await command.says("Ctrl-C stops it.")
    assert (await home.status())["pid"] == command.process.pid
    command.process.send_signal(number)
    command.process.send_signal(number)
    status, out = await command.ends()
    assert status == 0
    variables = ("DOCKER_HOST", "CONTAINER_HOST", "DOCKER_BUILDKIT")
    assert [line.strip().partition("=")[0] for line in out.splitlines()] == [f"export {v}" for v in variables]
    assert "reboot: Power down" in home.log(log="console")
    assert (await home.status())["why"] == "stopped"


async def test_a_second_signal_cuts_its_power(home: homes.Home, begin: Begin) -> None:
    """Of a guest that will not go."""
    command = await begin("deaf")
    await command.says("Ctrl-C stops it.")
    command.process.send_signal(signal.SIGINT)
    async with asyncio.timeout(homes.DEADLINE_S):
        while "the power button was pressed" not in home.log(log="console"):
            await asyncio.sleep(0.05)
    await asyncio.sleep(SAME_SIGNAL_S)  # measured: a signal that comes sooner counts as the first one
    command.process.send_signal(signal.SIGINT)
    assert (await command.ends())[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_before_it_is_ready_undoes_the_start(
    home: homes.Home, begin: Begin, number: signal.Signals
) -> None:
    """A signal during the start ends the command and the machine, with the signal's exit status."""
    command = await begin("never")
    console = home.machine("default") / "log" / "console.log"
    async with asyncio.timeout(homes.DEADLINE_S):
        while not console.exists() or "tiny: booted" not in console.read_text(errors="replace"):
            await asyncio.sleep(0.05)
    command.process.send_signal(number)
    assert (await command.ends())[0] == 128 + number


async def test_a_guest_that_powers_itself_off(begin: Begin) -> None:
    """Is a good end; where it is reached is one line of JSON."""
    command = await begin(arguments=("--json",))
    assert command.process.stdout is not None
    async with asyncio.timeout(homes.DEADLINE_S):
        info = json.loads(await command.process.stdout.readline())
    assert (info["name"], info["docker_host"]) == ("default", f"unix://{info['podman_socket']}")
    await tiny.order(info["ssh_port"], "poweroff -f")
    assert await command.ends() == (0, "")
    assert "has powered itself off" in command.err


async def test_a_machine_that_fails(home: homes.Home, begin: Begin) -> None:
    """Ends the command with what it died of."""
    command = await begin(arguments=("--json",))
    await command.says("Ctrl-C stops it.")
    (qemu,) = [pid for pid in processes.holders(home.root / "home") if "qemu-system" in processes.command(pid)]
    os.kill(qemu, signal.SIGKILL)
    status, out = await command.ends()
    assert (status, "killed by SIGKILL" in json.loads(out.splitlines()[-1])["error"]["exit_reason"]) == (1, True)
