"""Helper processes: spawned into the guard's group, logging to a file, always stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ovm.errors import HelperError, HelperExited, StartError, StopError
from ovm.process import confine, logs
from ovm.process import guard as guard_program

log = logging.getLogger(__name__)

GUARD_START_S = 20.0
"""Python starts slowly from a cold disk on a busy host."""
TERM_GRACE_S = 5.0
NOTICE_S = 0.1
"""Time for the event loop to learn that the guard has ended, if its end made something fail."""
KILL_GRACE_S = 10.0
"""Timeout of a killed process's end; the kernel needs a while to free gigabytes."""

_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")
"""Variables that a helper gets from the user's environment."""
_LOADERS_OWN = ("_PYI_", "LD_LIBRARY_PATH")
"""Prefixes of the variables by which PyInstaller's loader passes the app's files to a second process of the app."""


@dataclass(eq=False)
class Child:
    """A helper process. It writes its output to ``log_path``, not to a pipe."""

    name: str
    process: Process
    log_path: Path | None = None
    expected: bool = field(default=False)
    """Whether the manager has stopped it; any other exit is a failure, whatever its status."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it runs, as far as the event loop knows."""
        return self.process.returncode is None

    @property
    def was_killed(self) -> bool:
        """Whether a signal killed it."""
        return (self.process.returncode or 0) < 0

    @property
    def exit_reason(self) -> str:
        """How it ended, for messages; empty while it runs."""
        match self.process.returncode:
            case None:
                return ""
            case status if status < 0:
                return f"killed by {_signal_name(-status)}"
            case status:
                return f"exit status {status}"

    async def wait(self) -> str:
        """Wait until it ends; return the exit reason."""
        await self.process.wait()
        return self.exit_reason

    async def end(self, *, grace_s: float = TERM_GRACE_S) -> None:
        """Send SIGTERM, wait ``grace_s`` seconds, then send SIGKILL; return once it is reaped.

        Raises:
            StopError: the kernel does not end it.
        """
        self.expected = True
        if not self.running:
            return
        if grace_s > 0:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.process.wait()
                    return
            log.warning("%s ignored SIGTERM for %g s, killing it", self.name, grace_s)
        self.kill()
        await self.reaped()

    async def reaped(self) -> None:
        """Wait until a killed process is reaped.

        Raises:
            StopError: it still exists after KILL_GRACE_S seconds.
        """
        try:
            async with asyncio.timeout(KILL_GRACE_S):
                await self.process.wait()
        except TimeoutError as error:
            raise StopError(
                f"{self.name} (process {self.pid}) was killed but still exists after {KILL_GRACE_S:g} s"
            ) from error

    def kill(self) -> None:
        """Send SIGKILL without waiting; do nothing if it has ended."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if not self.running:
            return
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if sys.platform == "darwin":
                self.process.send_signal(number)
            # send_signal() would reap a process that has just ended, and the event loop would lose its status
            elif os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(self.pid, number)  # our child is not reaped yet, so no other process has its pid

    async def exited(self, stage: str) -> HelperExited:
        """Return the error for its unexpected exit."""
        tail = await asyncio.to_thread(logs.tail, self.log_path) if self.log_path else ()
        return HelperExited(
            f"{self.name} ended unexpectedly",
            stage=stage,
            exit_reason=self.exit_reason,
            log_tail=tail,
            hint=f"read its whole log: {self.log_path}" if self.log_path else "",
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(eq=False)
class Group:
    """The process group of one running machine, led by its guard."""

    guard: Child
    inherited_fds: tuple[int, ...]
    """The lock, which every helper inherits, so that it is released only when all have ended."""
    spawned: Callable[[Child], object] = lambda _: None
    """Callback with each helper as soon as it runs."""
    helpers: list[Child] = field(default_factory=list)

    async def spawn(
        self,
        name: str,
        argv: Sequence[str | os.PathLike[str]],
        *,
        log_path: Path,
        cwd: Path | None = None,
        pass_fds: Iterable[int] = (),
        rights: confine.Rights | None = None,
    ) -> Child:
        """Start a helper in this group; write its standard output and error to ``log_path``.

        ``rights`` limit its access to the host's files, if the host can confine helpers.

        Raises:
            HelperError: the program cannot be executed.
        """
        if rights is not None:
            argv = confine.command(argv, rights)
        with log_path.open("ab") as output:
            process = await _execute(
                name,
                argv,
                env=guard_environment() if argv[0] == guard_program.frozen_app() else clean_environment(),
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                process_group=self.guard.pid,
                pass_fds=(*pass_fds, *self.inherited_fds),
            )
        log.debug("%s is process %d", name, process.pid)
        child = Child(name, process, log_path)
        self.spawned(child)
        self.helpers.append(child)
        if not self.guard.running:  # it ended during the spawn, and follow_guard() may have missed this helper
            child.kill()
        return child

    async def follow_guard(self) -> None:
        """Kill the helpers as soon as the guard ends: without it they would outlive the manager."""
        await self.guard.wait()
        for child in self.helpers:
            child.kill()

    async def guard_is_lost(self) -> bool:
        """Return whether the guard has ended unexpectedly."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NOTICE_S):
                await self.guard.wait()
        return not self.guard.running and not self.guard.expected

    def kill(self) -> None:
        """Kill the whole group at once, including the guard; safe to call at any time."""
        if self.guard.running:  # once it is reaped, its pid, which is the group's number, may be reused
            self.guard.expected = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.guard.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Kill the whole group and wait until the guard is reaped.

        Raises:
            StopError: the kernel does not end the guard.
        """
        self.kill()
        await self.guard.reaped()


@contextlib.asynccontextmanager
async def at_last(end: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run ``end`` on exit. If the body failed, raise its error; an error of ``end`` becomes a note of it."""
    try:
        yield
    except BaseException as first:
        try:
            await end()
        except Exception as second:  # noqa: BLE001 - logged here, and kept as a note of the first
            log.warning("%s", second)
            first.add_note(f"Then the cleanup failed too: {second}")
        raise
    else:
        await end()


@contextlib.asynccontextmanager
async def _guard_followed(group: Group) -> AsyncIterator[None]:
    following = asyncio.create_task(group.follow_guard(), name="guard's end")
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait({following})


@contextlib.asynccontextmanager
async def process_group(
    inherited_fds: Sequence[int], *, log_path: Path, spawned: Callable[[Child], object] = lambda _: None
) -> AsyncIterator[Group]:
    """Create a guarded process group; kill what is left of it on exit, and at once if the guard ends.

    ``spawned`` is called with each of its processes as soon as it runs, first with the guard.

    Raises:
        StartError: the guard did not start.
        HelperExited: the guard ended, so the body failed.
    """
    with log_path.open("ab") as errors:
        process = await _execute(
            "guard",
            guard_command(os.getpid()),
            env=guard_environment(),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=errors,
            process_group=0,
            pass_fds=tuple(inherited_fds),
        )
    group = Group(Child("guard", process, log_path), tuple(inherited_fds), spawned)
    # Follow the guard until the group is killed: if the guard dies now, its helpers are killed one by one.
    async with _guard_followed(group), at_last(group.end):
        try:
            spawned(group.guard)
            assert process.stdout is not None
            try:
                async with asyncio.timeout(GUARD_START_S):
                    answer = await process.stdout.read(len(guard_program.WATCHING))
            except TimeoutError:
                raise StartError(f"the guard did not start within {GUARD_START_S:g} s", stage="guard") from None
            if answer != guard_program.WATCHING:
                await process.wait()
                raise await group.guard.exited("guard")
            yield group
        except Exception as error:
            if await group.guard_is_lost():
                raise await group.guard.exited(getattr(error, "stage", "")) from None
            raise


def guard_command(manager: int) -> list[str]:
    """Return the command that guards the process ``manager``: Python, or in a frozen app the app itself.

    ``-I`` ignores the user's PYTHON… variables and the working directory, ``-S`` skips site: the guard needs neither.

    Raises:
        StartError: the app has not called freeze_support(), so it would start a second time instead of being the guard.
    """
    if not (app := guard_program.frozen_app()):
        return [sys.executable, "-I", "-S", os.fspath(Path(guard_program.__file__)), str(manager)]
    if not guard_program.is_supported():
        raise StartError(
            "this frozen app cannot be its own guard",
            stage="guard",
            hint="call ovm.freeze_support() at the start of its main script",
        )
    return [app, guard_program.ARGUMENT, str(manager)]


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a helper: only the variables it needs from the user's."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | dict(extra or {})


def guard_environment() -> dict[str, str]:
    """Return the environment of the guard and of the confining wrapper: a frozen app finds its files by it."""
    if not guard_program.frozen_app():
        return clean_environment()
    return clean_environment({name: os.environ[name] for name in os.environ if name.startswith(_LOADERS_OWN)})


def users_environment() -> dict[str, str]:
    """Return the user's whole environment, for the system's programs: without a frozen app's library path."""
    environment = dict(os.environ)
    if guard_program.frozen_app():
        environment.pop("LD_LIBRARY_PATH", None)
        if (original := environment.pop("LD_LIBRARY_PATH_ORIG", None)) is not None:
            environment["LD_LIBRARY_PATH"] = original
    return environment


async def _execute(
    name: str, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None, **options: object
) -> Process:
    try:
        return await asyncio.create_subprocess_exec(
            *(os.fspath(word) for word in argv),
            env=clean_environment() if env is None else env,
            umask=0o077,
            **options,  # type: ignore[arg-type]  # typeshed lacks process_group here
        )
    except (OSError, ValueError) as error:
        raise HelperError(
            f"{name} cannot be started: {error}", hint=f"check {os.fspath(argv[0])} with `ovm doctor`"
        ) from error
