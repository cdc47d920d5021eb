"""Other programs: run to their end or ended with all they started, and what people would use instead of ovm."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.setting import NotHereError

DEADLINE_S = 300.0
END_GRACE_S = 15.0
TAIL_LINES = 20
NOBODY = "nobody"
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

Argument = str | os.PathLike[str]


class ProgramError(Exception):
    """A program failed; says which, and its last words."""


def search_path() -> str:
    """Where programs are, those for administrators included, which an ordinary user of Debian does not see."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])


def find(program: str, package: str) -> str:
    """Where ``program`` is.

    Raises:
        NotHereError: it is missing.
    """
    found = shutil.which(program, path=search_path())
    if found is None:
        raise NotHereError(f"there is no {program} here; it is in the package {package}")
    return found


async def run(
    argv: Sequence[Argument],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    user: str | None = None,
    deadline_s: float = DEADLINE_S,
    bound: bool = True,
) -> str:
    """Run a program to its end; returns what it printed. However we end, it and all it started are ended, too.

    Args:
        argv: It and its arguments.
        environment: Nothing but that; ours if not given.
        cwd: Where it runs.
        user: As whom, if not as ourselves.
        deadline_s: Seconds it may take.
        bound: Whether it is ended even if we are killed, for which another program starts it.

    Raises:
        ProgramError: it failed, or took longer.
    """
    spawning = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *(("setpriv", "--pdeathsig", "TERM") if bound else ()), *argv,
            env=environment, cwd=cwd, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True,
            user=user, group=user and pwd.getpwnam(user).pw_gid, extra_groups=user and (),
        )
    )  # fmt: skip
    try:
        process = await asyncio.shield(spawning)
    except asyncio.CancelledError:  # asyncio itself would end it alone, and not what it has started by then
        await _end(await spawning)
        raise
    try:
        async with asyncio.timeout(deadline_s):
            output, _ = await process.communicate()
    except TimeoutError:
        raise ProgramError(f"{os.fspath(argv[0])} was not done within {deadline_s:g} s") from None
    finally:
        await _end(process)
    text = output.decode(errors="replace")
    if process.returncode != 0:
        last = "\n".join(text.splitlines()[-TAIL_LINES:])
        raise ProgramError(f"{' '.join(os.fspath(word) for word in argv)} ended with {process.returncode}:\n{last}")
    return text


async def _end(process: asyncio.subprocess.Process) -> None:
    """End its session, politely first: who booted a machine has to end it."""
    if process.returncode is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_GRACE_S):
                await process.wait()


async def time_of(
    argv: Sequence[Argument], *, environment: Mapping[str, str] | None = None, user: str | None = None
) -> float:
    """The milliseconds from the program's spawn to its end."""
    begun = time.perf_counter()
    await run(argv, environment=environment, user=user, bound=False)
    return (time.perf_counter() - begun) * 1000


def python(*arguments: str) -> list[str]:
    """This Python."""
    return [sys.executable, *arguments]


def own(command: str) -> str:
    """A command that was installed beside this Python."""
    return os.fspath(Path(sys.executable).parent / command)


def ordinary_user(home: Path) -> tuple[str | None, dict[str, str]]:
    """Who to be where root is refused, and that user's environment, with the empty directory ``home``."""
    home.mkdir(mode=0o700)
    environment = {"PATH": os.environ["PATH"], "HOME": os.fspath(home), "XDG_RUNTIME_DIR": os.fspath(home)}
    if os.geteuid() != 0:
        return None, environment
    shutil.chown(home, NOBODY)
    return NOBODY, environment
