"""A real terminal, by a tmux of the test's own: what a person types, and what is on the screen then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import under

DEADLINE_S = 120.0
PROMPT = "ready> "
ENDED = "ended:"


class Terminal:
    """One pane, with a shell that says ``PROMPT``; :func:`opened` makes it."""

    def __init__(self, directory: Path, environment: Mapping[str, str], *, columns: int, lines: int) -> None:
        self._argv = [under.program("tmux"), "-S", os.fspath(directory / "tmux.sock"), "-f", "/dev/null"]
        programs = directory / "bin"
        programs.mkdir(exist_ok=True)
        ovm = programs / "ovm"
        ovm.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m ovm "$@"\n')
        ovm.chmod(0o755)
        told = environment | {"PATH": f"{programs}:{environment['PATH']}", "PS1": PROMPT, "LC_ALL": "C.UTF-8"}
        told |= {"TERM": "tmux-256color", "HISTFILE": ""}
        shell = ["bash", "--norc", "--noprofile", "-i"]
        variables = [f"{name}={value}" for name, value in told.items()]
        size = ["-x", str(columns), "-y", str(lines)]
        self._run(["new-session", "-d", *size, "-s", "one", "env", "-i", *variables, *shell])
        self._run(["set-option", "-g", "history-limit", "5000"])

    def _run(self, argv: list[str]) -> str:
        environment = {key: value for key, value in os.environ.items() if key not in {"TMUX", "CI", "NO_COLOR"}}
        done = subprocess.run([*self._argv, *argv], capture_output=True, text=True, check=True, env=environment)
        return done.stdout

    def type(self, text: str) -> None:
        """A line, as typed."""
        self._run(["send-keys", "-t", "one", "-l", text])
        self.press("Enter")

    def press(self, *keys: str) -> None:
        """Keys by tmux's names: ``C-c``, ``Enter``."""
        self._run(["send-keys", "-t", "one", *keys])

    def screen(self, *, coloured: bool = False) -> str:
        """All that is and was on it; lines that were wrapped are joined."""
        return self._run(["capture-pane", "-t", "one", "-p", "-J", "-S", "-", *(["-e"] if coloured else [])]).rstrip()

    async def shows(self, *words: str) -> str:
        """Waits for all of them; returns the screen then."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not all(word in (screen := self.screen()) for word in words):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"no {words} in:\n{self.screen()}") from None
        return screen

    async def begin(self, command: str) -> None:
        """``command`` on an empty screen; its end is marked."""
        self.press("C-l")
        await asyncio.sleep(0.2)
        self._run(["clear-history", "-t", "one"])
        self.type(f"{command}; echo {ENDED}$?")

    async def ended(self) -> tuple[int, str]:
        """Waits for the end of what was begun: its status, and all it has printed, without a traceback."""
        screen = await self.shows(f"\n{ENDED}")
        printed, _, status = screen.rpartition(f"\n{ENDED}")
        assert "Traceback" not in screen, screen
        return int(status.split()[0]), printed.partition("\n")[2]

    async def run(self, command: str) -> tuple[int, str]:
        """Its status, and all it prints."""
        await self.begin(command)
        return await self.ended()

    def close(self) -> None:
        """As a person closes the window: its programs get SIGHUP."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run(["kill-server"])


@contextlib.contextmanager
def opened(
    directory: Path, environment: Mapping[str, str], *, columns: int = 100, lines: int = 40
) -> Iterator[Terminal]:
    """A terminal, for as long as inside; its files are in ``directory``, whose path must be short."""
    directory.mkdir(exist_ok=True)
    terminal = Terminal(directory, environment, columns=columns, lines=lines)
    try:
        yield terminal
    finally:
        terminal.close()
