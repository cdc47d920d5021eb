"""Helper processes: spawned into the guard's group, logging to a file, ended for certain."""

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
"""A Python that has to be read from a cold disk on a busy machine is slow."""
TERM_GRACE_S = 5.0
NOTICE_S = 0.1
"""In which the event loop has learned that the guard is gone, if that is why something failed."""
KILL_GRACE_S = 10.0
"""How long a killed process may take to vanish; freeing gigabytes takes the kernel a while."""

_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")
"""What of the user's environment a helper gets to see."""
_LOADERS_OWN = ("_PYI_", "LD_LIBRARY_PATH")
"""How the loader of a frozen app (PyInstaller's) tells a second process of it where the first one's files are."""


@dataclass(eq=False)
class Child:
    """A helper process. Its output goes to ``log_path``; nobody has to read a pipe."""

    name: str
    process: Process
    log_path: Path | None = None
    expected: bool = field(default=False)
    """Whether somebody asked it to end; an exit that nobody asked for is a failure, whatever its status."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet, as far as the event loop knows."""
        return self.process.returncode is None

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it, and not the program itself."""
        return (self.process.returncode or 0) < 0

    @property
    def exit_reason(self) -> str:
        """How it ended, in words; empty while it runs."""
        match self.process.returncode:
            case None:
                return ""
            case status if status < 0:
                return f"killed by {_signal_name(-status)}"
            case status:
                return f"exit status {status}"

    async def wait(self) -> str:
        """Until it ends; returns how."""
        await self.process.wait()
        return self.exit_reason

    async def end(self, *, grace_s: float = TERM_GRACE_S) -> None:
        """Ask with SIGTERM, wait ``grace_s`` seconds, then SIGKILL; returns when it is gone and reaped.

        Raises:
            StopError: the kernel does not let it go.
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
        """Wait until the kernel has released a killed process.

        Raises:
            StopError: it is still there after KILL_GRACE_S seconds.
        """
        try:
            async with asyncio.timeout(KILL_GRACE_S):
                await self.process.wait()
        except TimeoutError as error:
            raise StopError(
                f"{self.name} (process {self.pid}) was killed but is still there after {KILL_GRACE_S:g} s"
            ) from error

    def kill(self) -> None:
        """SIGKILL, and no waiting; fine if it has ended."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if not self.running:
            return
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if sys.platform == "darwin":
                self.process.send_signal(number)
            # send_signal() reaps who has just ended behind the event loop's back, and how it ended would be lost
            elif os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(self.pid, number)  # it is our child, so its number is nobody else's

    async def exited(self, stage: str) -> HelperExited:
        """The error that tells of its death."""
        tail = await asyncio.to_thread(logs.tail, self.log_path) if self.log_path else ()
        return HelperExited(
            f"{self.name} ended unexpectedly",
            stage=stage,
            exit_reason=self.exit_reason,
            log_tail=tail,
            hint=f"its whole log is {self.log_path}" if self.log_path else "",
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
    """The lock, which every helper keeps open so that it is free only when all are gone."""
    spawned: Callable[[Child], object] = lambda _: None
    """Called with each helper as soon as it runs."""
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
        """Start a helper in this group, with standard output and error in ``log_path``.

        With ``rights`` it has no others to the host's files, where the host can see to that.

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
        if not self.guard.running:  # it has joined what is left of the group
            child.kill()
        return child

    async def follow_guard(self) -> None:
        """Kill the helpers as soon as the guard is gone: without it they would outlive us."""
        await self.guard.wait()
        for child in self.helpers:
            child.kill()

    async def guard_is_lost(self) -> bool:
        """Whether the guard has ended, and nobody had asked it to."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NOTICE_S):
                await self.guard.wait()
        return not self.guard.running and not self.guard.expected

    def kill(self) -> None:
        """End everything in the group at once, the guard included; safe to call at any time."""
        if self.guard.running:  # once reaped, its pid and with it the group's number may be reused
            self.guard.expected = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.guard.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Kill everything in the group and wait until the guard is reaped.

        Raises:
            StopError: the kernel does not release the guard.
        """
        self.kill()
        await self.guard.reaped()


@contextlib.asynccontextmanager
async def at_last(end: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run ``end`` on the way out. If the body failed, its error is raised; that of ``end`` becomes a note of it."""
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
    """A guarded process group; everything left in it is killed on the way out, and at once if the guard ends.

    ``spawned`` is called with each process of it, the guard first, as soon as it runs.

    Raises:
        StartError: the guard did not come up.
        HelperExited: the guard ended, which is why whatever was done inside failed.
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
    # The group is killed while its guard is still followed: helpers of a guard that dies now are killed one by one.
    async with _guard_followed(group), at_last(group.end):
        try:
            spawned(group.guard)
            assert process.stdout is not None
            try:
                async with asyncio.timeout(GUARD_START_S):
                    answer = await process.stdout.read(len(guard_program.WATCHING))
            except TimeoutError:
                raise StartError(f"the guard did not answer within {GUARD_START_S:g} s", stage="guard") from None
            if answer != guard_program.WATCHING:
                await process.wait()
                raise await group.guard.exited("guard")
            yield group
        except Exception as error:
            if await group.guard_is_lost():
                raise await group.guard.exited(getattr(error, "stage", "")) from None
            raise


def guard_command(manager: int) -> list[str]:
    """How the guard of the process ``manager`` is started: by Python, or in a frozen app by the app itself.

    ``-I`` keeps the user's PYTHON… variables and the working directory out, ``-S`` skips site: it needs neither.

    Raises:
        StartError: the app would not know that it is to be the guard, and start a second time.
    """
    if not (app := guard_program.frozen_app()):
        return [sys.executable, "-I", "-S", os.fspath(Path(guard_program.__file__)), str(manager)]
    if not guard_program.is_supported():
        raise StartError(
            "this frozen app cannot be its own guard",
            stage="guard",
            hint="call ovm.freeze_support() first thing in its main script",
        )
    return [app, guard_program.ARGUMENT, str(manager)]


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of every helper: nothing of the user's but what it needs."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | dict(extra or {})


def guard_environment() -> dict[str, str]:
    """The environment of the guard, or of what confines helpers: a frozen app finds its own files in it."""
    if not guard_program.frozen_app():
        return clean_environment()
    return clean_environment({name: os.environ[name] for name in os.environ if name.startswith(_LOADERS_OWN)})


def users_environment() -> dict[str, str]:
    """The user's whole environment, for the system's own programs: without the libraries of a frozen app."""
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
            **options,  # type: ignore[arg-type]  # typeshed knows no process_group here
        )
    except (OSError, ValueError) as error:
        raise HelperError(
            f"{name} cannot be started: {error}", hint=f"check {os.fspath(argv[0])} with `ovm doctor`"
        ) from error
