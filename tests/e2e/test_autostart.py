"""What a login runs: the program in the files that ``ovm autostart`` writes, as systemd and launchd would run it."""

from __future__ import annotations

import asyncio
import plistlib
import signal
import sys
from asyncio.subprocess import DEVNULL
from pathlib import Path

import pytest

import homes
from ovm.integrations import autostart

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(sys.platform != "linux", reason="the tiny image is one for QEMU"),
]


async def test_a_login_starts_a_machine_and_its_end_shuts_it_down(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an environment with nothing but what the file carries and what every login has."""
    home.init("dev")
    for name in autostart.CARRIED:
        monkeypatch.setenv(name, home.environment[name])
    told = plistlib.loads(autostart.agent("dev").encode())
    login = {name: home.environment[name] for name in ("HOME", "XDG_RUNTIME_DIR")}
    Path(told["StandardOutPath"]).parent.mkdir()
    with Path(told["StandardOutPath"]).open("wb") as log:
        service = await asyncio.create_subprocess_exec(
            *told["ProgramArguments"],
            env=login | told["EnvironmentVariables"],
            cwd="/",
            stdin=DEVNULL,
            stdout=log,
            stderr=log,
        )
    async with asyncio.timeout(homes.DEADLINE_S):
        while not (home.machine("dev") / "service.json").exists():
            await asyncio.sleep(0.1)
    await home.good("start", "dev")  # waits for the one that is being started
    assert (await home.status("dev"))["pid"] == service.pid
    service.send_signal(signal.SIGTERM)
    async with asyncio.timeout(homes.DEADLINE_S):
        assert await service.wait() == 0, home.log("dev")
    assert "the power button was pressed" in home.log("dev", "console")
    assert (await home.status("dev"))["why"] == "stopped"
    await home.nothing_left()
