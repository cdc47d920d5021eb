"""A machine: the boot told top to bottom, and the only writer of its state."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from ovm import health, power, prepare
from ovm.boot import (
    BLAME_WAIT_S,
    STOP_TIMEOUT_S,
    Shutdown,
    blame,
    boot_error,
    come_up,
    cut_power,
    explain,
    find_panic,
    go_on,
    power_on,
    shut_down,
)
from ovm.care import Care
from ovm.checks import check_address, check_port
from ovm.disks.suspended import Unfit, is_there
from ovm.disks.verify import FileState, verify
from ovm.errors import (
    GuestError,
    HelperExited,
    OptionError,
    OVMError,
    StartError,
    StateError,
    StopError,
    UnsupportedError,
)
from ovm.events import Event, EventName, Events, Listener
from ovm.guest.clock import ClockSync
from ovm.guest.ssh import ExecResult
from ovm.hypervisors import Happening
from ovm.info import Health, Info, Stage
from ovm.network.gvproxy import Forward, Protocol
from ovm.paths import KeyPaths, TargetPaths
from ovm.process.child import Child
from ovm.process.supervise import first_exit, race
from ovm.prune import Pruned, prune
from ovm.session import Session
from ovm.state import StateInfo, VMState, may_follow, state_info
from ovm.suspension import SUSPEND_TIMEOUT_S, Recall, save
from ovm.suspension import check as check_suspension

if TYPE_CHECKING:
    import asyncssh

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 180.0
"""From the hypervisor's start to the guest's ready; emulated guests on busy machines are slow."""
FIRST_WORD_S = 60.0
"""A kernel that has run nothing of ours by then is taken to hang, and is given one more try."""
RESTART_AGAIN_S = 60.0
"""A machine whose network is lost again so soon after a restart is not restarted once more."""
ROOM_AGAIN_S = 5.0
"""How often it is looked whether the host has room again for a guest that stands still for want of it."""


class OVM:
    """A virtual machine that runs Podman. Made by :func:`ovm.create_linux_ovm` or :func:`ovm.create_ovm`.

    ``async with machine:`` starts it and stops it. One object can be started and stopped any number of times; it
    belongs to the event loop that started it, and if that loop ends, the guest is shut down with it.
    """

    def __init__(self, prepared: prepare.Prepared) -> None:
        self.options = prepared.options
        self._prepared = prepared
        self._events = Events()
        self._state = VMState.STOPPED
        self._session: Session | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._changes: set[asyncio.Task[None]] = set()
        self._asleep = False
        """Whether the host's sleep has paused it, or is about to."""
        self._syncing: asyncio.Task[ClockSync] | None = None
        self._care: Care | None = None
        self._saving: asyncio.Task[None] | None = None
        self._is_suspended = self._resume_wanted = False
        self._not_resumed = ""
        self._progress: list[Callable[[str], object]] = []
        self._restarted_at = -math.inf
        self._began = 0.0
        self._stages: list[Stage] = []

    def __repr__(self) -> str:
        return f"<OVM {self.options.target_dir} {self._state.removeprefix('VirtualMachineState')}>"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- start and stop

    async def start(
        self,
        *,
        resume: bool = True,
        timeout_s: float = READY_TIMEOUT_S,
        progress: Callable[[str], object] | None = None,
    ) -> None:
        """Boot, or go on from where :meth:`suspend` left off; returns when podman answers.

        A memory that does not go with the machine any more is removed and the guest boots; ``info.not_resumed`` says
        why. Cancelling it leaves nothing behind, nor does a failure.

        Args:
            resume: Whether to go on from a memory that is there; if not, it is removed.
            timeout_s: Seconds the guest may take from the hypervisor's start to its ready.
            progress: Called with each stage as it is done, by the names that are in ``info.timings``.

        Raises:
            StateError: it is not stopped.
            InUseError: another process owns one of the directories.
            FileError: a file or directory of it is not there any more or cannot be used.
            HelperError: a helper cannot be executed.
            PortError: no port is to be had for ssh or podman.
            StartError: it did not come up; says at which stage, how a helper ended, and its last words.
            GuestError: the guest said it was ready, but cannot be reached.
        """
        if self._keeper is not None and not self._keeper.done():
            raise StateError(f"the machine is {self._spoken()} already", hint="stop() it first")
        self._timeout_s = timeout_s
        self._restarted_at = -math.inf
        self._stop_wanted, self._force_wanted = asyncio.Event(), asyncio.Event()
        self._stop_timeout_s = STOP_TIMEOUT_S
        self._progress = [] if progress is None else [progress]
        self._resume_wanted, self._not_resumed = resume, ""
        # one look at a name; to wait for a thread here would let a second start in
        restoring = resume and is_there(TargetPaths(self.options.target_dir))
        started = self._begin(VMState.RESTORING if restoring else VMState.STARTING)
        self._keeper = asyncio.create_task(self._keep(started), name=f"{self!r}")
        try:
            await asyncio.shield(started)
        except asyncio.CancelledError:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
            raise

    def _begin(self, first: VMState = VMState.STARTING) -> asyncio.Future[None]:
        """From Stopped to ``first``, with nothing of an earlier life; returns what is done once it is ready."""
        self._began = time.monotonic()
        self._stages = []
        self._powered_off, self._fallen = asyncio.Event(), asyncio.Event()
        self._happened: asyncio.Queue[tuple[Happening, str]] = asyncio.Queue()
        self._network_is_lost = self._fell_early = False
        self._asleep = self._is_suspended = False
        self._to(first)
        return asyncio.get_running_loop().create_future()

    async def stop(
        self,
        *,
        force: bool = False,
        timeout_s: float = STOP_TIMEOUT_S,
        progress: Callable[[str], object] | None = None,
    ) -> None:
        """Shut the guest down and end every helper; fine if it is stopped.

        The guest is asked to power off, then its power button is pressed; when ``timeout_s`` seconds are over, or if
        it cannot be asked at all, its power is cut. A second stop joins the first (and may force it), a stop during a
        start cancels the start. Once begun it is finished, even if the caller is cancelled.

        Args:
            force: Cut the power at once, which is a power failure to the guest: what was not flushed is lost.
            timeout_s: Seconds the guest may take to shut down; those of the first of several stops count.
            progress: Called with each step, in words for people.

        Raises:
            OptionError: ``timeout_s`` is negative.
            StopError: a helper could not be ended.
        """
        if timeout_s < 0:
            raise OptionError(f"timeout_s={timeout_s!r} is negative")
        keeper = self._keeper
        if keeper is None or keeper.done():
            return
        first = not self._stop_wanted.is_set()
        if first:
            self._stop_timeout_s = timeout_s
            self._progress = []
        if progress is not None:
            self._progress.append(progress)
        self._stop_wanted.set()
        if force:
            self._force_wanted.set()
        if first and self._session is None:
            keeper.cancel()
        await asyncio.wait({keeper})
        if keeper.cancelled() or keeper.exception() is None:
            return
        raise StopError("the machine could not be stopped cleanly") from keeper.exception()

    async def wait_closed(self) -> None:
        """Until it is down for good, and not only to be started again because its network was lost."""
        if self._keeper is not None:
            await asyncio.wait({self._keeper})

    async def _keep(self, started: asyncio.Future[None]) -> None:
        """The life of one start, from its first step to its ``close``, and of the next if its network was lost."""
        self._tried_again = False
        while True:
            error = await self._outlive(started)
            if self._fell_early and not self._tried_again and not self._stop_wanted.is_set():
                log.warning("the guest's kernel fell before its first word, so it is started once more: %s", error)
                self._tried_again, _ = True, self._begin()
                continue
            if isinstance(error, Unfit) and not self._stop_wanted.is_set():
                self._resume_wanted, self._not_resumed, _ = False, str(error), self._begin()
                continue
            told = error if isinstance(error, OVMError) or error is None else OVMError(f"internal error: {error!r}")
            if told is not None and not self._stop_wanted.is_set():
                self._events.emit("error", told)
            self._events.emit("close")
            if not started.done():
                if error is None:
                    started.cancel()
                else:
                    started.set_exception(error)
                    started.exception()  # start() may have been cancelled meanwhile and never look
            elif error is not None and self._stop_wanted.is_set():
                raise error  # to stop()'s caller
            if not self._is_to_restart():
                return
            log.warning("starting again, because the network was lost")
            self._restarted_at = time.monotonic()
            started = self._begin()

    def _is_to_restart(self) -> bool:
        if not self._network_is_lost or self._stop_wanted.is_set() or self.options.network_loss != "restart":
            return False
        return time.monotonic() - self._restarted_at > RESTART_AGAIN_S

    async def _outlive(self, started: asyncio.Future[None]) -> BaseException | None:
        """One life, to its end; returns what it died of."""
        error: BaseException | None = None
        try:
            await self._live(started)
        except asyncio.CancelledError:
            if self._stop_wanted.is_set() and not started.done():
                error = StartError("the machine was stopped before it was ready")
        except BaseExceptionGroup as group:
            error = first_error(group)
        except Exception as failure:  # noqa: BLE001 - told to start()'s caller or to the listeners
            error = failure
            if isinstance(failure, OSError) and not started.done():
                error = StartError(f"a file or socket cannot be used: {failure}")
                error.__cause__ = failure
        for task in self._background:
            task.cancel()
        self._session = self._care = None
        self._to(VMState.STOPPED)
        if error is not None and not isinstance(error, OVMError):
            log.error("the machine failed", exc_info=error)
        return error

    async def _live(self, started: asyncio.Future[None]) -> None:
        async with contextlib.AsyncExitStack() as stack:
            recall = Recall(wanted=self._resume_wanted, given_up=self._boots_instead)
            self._resume_wanted = False  # of what comes after this start, nothing goes on from what is there now
            session = await stack.enter_async_context(
                power_on(self._prepared, recall=recall, step=self._done, watcher=self._hear)
            )
            if self.options.pause_on_sleep:
                await stack.enter_async_context(power.watch(self._before_sleep, self._after_wake))
            if recall.record is None:
                await self._come_up(session)
            else:
                await self._go_on(session, recall)
            self._session = session
            self._care = Care(
                session, self._prepared.driver, is_running=lambda: self._state is VMState.RUNNING, changed=self._changed
            )
            self._to(VMState.RUNNING)
            self._events.emit("ready")
            started.set_result(None)
            self._attend(session)
            try:
                await self._stay(session)
            finally:
                # also when the event loop itself is ending: it waits for us
                await self._leave(session)

    def _attend(self, session: Session) -> None:
        """What is done for a machine all the time that it runs."""
        if session.profile.engine:
            self._in_background(session.keep_attached())
        if self._care is not None:
            self._in_background(self._care.keep_looking())

    async def _leave(self, session: Session) -> None:
        """Shut the guest down; of one whose memory is kept, only the power is cut."""
        if self._saving is not None and not self._is_suspended:
            self._saving.cancel()
            await asyncio.wait({self._saving})
        for task in self._background:
            task.cancel()
        if self._is_suspended:
            await cut_power(session)
            return
        self._to(VMState.STOPPING)
        await shut_down(
            session, Shutdown(tell=self._tell, force_wanted=self._force_wanted, timeout_s=self._stop_timeout_s)
        )

    async def _come_up(self, session: Session) -> None:
        """Wait for the guest's ready; what can wait itself is done after it."""
        try:
            await race(
                self._come_up_or_fall(session),
                session.children,
                stage="boot",
                timeout_s=self._timeout_s,
                evidence=session.console_log,
                hint=f"the guest's console is in {session.console_log}",
            )
        except HelperExited as noticed:
            raise await explain(session, noticed, self._guest_powered_off) from None
        heard = (
            Stage(
                f"guest: {s.name}",
                (s.heard_at - self._began) * 1000,
                None if s.uptime_s is None else s.uptime_s * 1000,
            )
            for s in session.channel.stages
        )
        self._stages = sorted([*self._stages, *heard], key=lambda stage: stage.ms)
        if session.profile.engine:
            self._in_background(session.settle())

    async def _go_on(self, session: Session, recall: Recall) -> None:
        """Have the guest go on from its memory.

        Raises:
            Unfit: it does not; it can boot instead.
        """
        try:
            lost = await race(
                go_on(session, recall, step=self._done), session.children, stage="resume", timeout_s=self._timeout_s
            )
        except (OVMError, BaseExceptionGroup) as error:
            told = first_error(error)
            if not isinstance(told, OVMError):
                raise
            raise Unfit(f"the guest did not go on: {told}") from error
        for port in lost:
            self._events.emit("error", port)
        if session.profile.engine:
            self._in_background(session.settle())  # it may have been suspended before it was

    def _boots_instead(self, why: str) -> None:
        self._not_resumed = why
        self._to(VMState.STARTING)

    async def _come_up_or_fall(self, session: Session) -> None:
        async with asyncio.TaskGroup() as tasks:
            falling = tasks.create_task(self._fall(session))
            await come_up(session, step=self._done)
            falling.cancel()

    async def _fall(self, session: Session) -> None:
        """A guest that resets itself before its ready would do so again and again.

        Unless it was its kernel, before anything of ours ran: QEMU 7.2's TCG, emulating two processors, was seen to
        trip over an instruction that the kernel was patching, and once in a thousand boots to hang.
        """
        why = "the guest reset itself before it was ready"
        if self._session is None and not self._tried_again and not session.profile.over_vsock:
            try:
                async with asyncio.timeout(FIRST_WORD_S):
                    await self._fallen.wait()
            except TimeoutError:
                if not session.channel.stages:
                    self._fallen.set()
                    why = f"the guest's kernel has said nothing for {FIRST_WORD_S:g} s"
        await self._fallen.wait()
        self._fell_early = not session.channel.stages
        raise await boot_error(session, why)

    async def _stay(self, session: Session) -> None:
        """Until a stop is wanted or the guest powers off; whatever else ends and cannot be healed is an error."""
        death = asyncio.create_task(first_exit(session.children))
        stop = asyncio.create_task(self._stop_wanted.wait())
        heard = asyncio.create_task(self._happened.get())
        rebooting: asyncio.Task[None] | None = None
        healing: asyncio.Task[None] | None = None
        try:
            while True:
                waits = {task for task in (death, stop, heard, rebooting, healing) if task is not None}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if stop.done():
                    return
                if death.done():
                    culprit = await blame(session, death.result())
                    if not await self._can_heal(session, culprit):
                        return
                    healing = asyncio.create_task(self._heal(culprit))
                    death = asyncio.create_task(first_exit(c for c in session.children if c is not culprit))
                if healing is not None and healing.done():
                    healing.result()
                    healing = None
                    death.cancel()
                    death = asyncio.create_task(first_exit(session.children))
                if rebooting is not None and rebooting.done():
                    rebooting.result()
                    rebooting = None
                if heard.done():
                    what, words = heard.result()
                    heard = asyncio.create_task(self._happened.get())
                    if what is Happening.REBOOTED:
                        if rebooting is not None:
                            rebooting.cancel()
                        rebooting = asyncio.create_task(self._come_up_again(session))
                    elif what in {Happening.FAILED, Happening.OUT_OF_SPACE}:
                        self._fail(what, words)
        finally:
            for task in (death, stop, heard, rebooting, healing):
                if task is not None:
                    task.cancel()

    async def _can_heal(self, session: Session, culprit: Child) -> bool:
        """Whether the machine can live on without the helper that has died; a guest that powered itself off need not.

        Raises:
            HelperExited: it cannot.
        """
        if culprit is session.network.child:
            if self._prepared.driver.can_replug:
                return True
            self._network_is_lost = True
        elif await self._guest_powered_off(culprit):
            log.info("the guest powered itself off")
            return False
        raise await culprit.exited("running")

    async def _heal(self, gvproxy: Child) -> None:
        assert self._care is not None
        try:
            lost = await self._care.heal(gvproxy)
        except HelperExited:
            self._network_is_lost = True
            raise
        for port in lost:
            self._events.emit("error", port)

    def _fail(self, what: Happening, words: str) -> None:
        """The hypervisor has stopped the guest on its own account."""
        self._to(VMState.ERROR)
        hint = "stop() it; the log of the hypervisor may tell more"
        if what is Happening.OUT_OF_SPACE:
            hint = "make room on the host's disk: it goes on by itself then, or at once after vm_resume()"
        error = GuestError(f"the virtual machine was stopped by its hypervisor: {words}", hint=hint)
        self._events.emit("error", error)
        if self._care is not None:
            self._care.ails(error.message)
        if what is Happening.OUT_OF_SPACE:
            self._in_background(self._go_on_with_room())

    async def _go_on_with_room(self) -> None:
        """Until the host has room again for what the guest wants to write, or somebody else resumes or stops it."""
        while self._state is VMState.ERROR:
            if await health.has_room(self.options):
                with contextlib.suppress(OVMError):
                    await self._to_its_end(self._resume())
                return
            await asyncio.sleep(ROOM_AGAIN_S)

    async def _guest_powered_off(self, ended: Child) -> bool:
        """Whether the guest itself did it; a QEMU that somebody terminated ends with the same status."""
        if ended.process.returncode != 0:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BLAME_WAIT_S):  # QEMU's last words may be read after its death
                await self._powered_off.wait()
        return self._powered_off.is_set()

    async def _come_up_again(self, session: Session) -> None:
        """The guest has reset itself."""
        self._began, self._stages = time.monotonic(), []
        if panic := await find_panic(session):
            self._events.emit("error", panic)
        await session.guest_was_reset()
        try:
            await self._come_up(session)
        except Exception:
            self._force_wanted.set()  # there is nothing in it to shut down
            raise
        self._to(VMState.RUNNING)
        self._events.emit("ready")

    # -- what a running machine can do

    @property
    def state(self) -> VMState:
        """The state as the manager knows it; :meth:`vm_state` asks the hypervisor too."""
        return self._state

    @property
    def info(self) -> Info:
        """Where the machine can be reached.

        Raises:
            StateError: it is neither running nor paused.
        """
        session = self._in({VMState.RUNNING, VMState.PAUSED}, "info")
        keys = KeyPaths(self.options.ssh_key_dir)
        return Info(
            podman_socket=session.sockets.podman,
            podman_port=session.podman_port,
            ssh_port=session.ssh.port,
            ssh_key=keys.user_key,
            ssh_user="root",
            hypervisor=self._prepared.driver.name,
            accelerator=self._prepared.driver.accelerator,
            accelerator_reason=self._prepared.driver.accelerator_reason,
            cpus=self.options.cpus,
            memory_mib=self.options.memory_mib,
            data_disk=TargetPaths(self.options.target_dir).data_disk,
            log_dir=self.options.log_dir,
            timings=tuple(self._stages),
            not_resumed=self._not_resumed,
            health=self._care.health if self._care is not None else Health(),
        )

    async def check_health(self) -> Health:
        """Look now at what is looked at each minute: podman by way of its socket, the guest, and its disks.

        Raises:
            StateError: it is not running.
        """
        self._running("check_health")
        assert self._care is not None
        return (await self._care.look()).health

    async def vm_state(self) -> StateInfo:
        """The state, as the hypervisor tells it now, and what can be asked of the machine."""
        settled = {VMState.RUNNING, VMState.PAUSED, VMState.ERROR}
        state = self._state
        if self._session is not None and state in settled:
            with contextlib.suppress(GuestError):  # it is ending this very moment: ours will say so next
                told = await self._session.vm.state()
                state = told if told in settled and self._state in settled else self._state
        return state_info(state)

    async def vm_pause(self) -> None:
        """Let the virtual CPUs stand still; fine if they do.

        Raises:
            StateError: it is neither running nor paused.
            GuestError: the hypervisor did not do as asked.
        """
        self._asleep = False
        await self._to_its_end(self._pause())

    async def _pause(self) -> None:
        if self._syncing is not None:  # after a resume; its guest is not to run for that alone
            self._syncing.cancel()
        async with self._turn:
            if self._state is VMState.PAUSED:
                return
            session = self._running("vm_pause")
            self._to(VMState.PAUSING)
            try:
                await session.vm.pause()
            except OVMError:
                if self._state is VMState.PAUSING:
                    self._to(VMState.RUNNING)
                raise
            if self._state is not VMState.PAUSING:  # it was stopped, say, or failed meanwhile
                self._refuse("vm_pause")
            self._to(VMState.PAUSED)
            self._events.emit("vmPause")

    async def vm_resume(self) -> None:
        """Let the virtual CPUs run again, and set the guest's clock; fine if they run.

        A machine in Error goes on too if its hypervisor can: one whose disk had no room left on the host, for one.

        Raises:
            StateError: it is neither running, paused nor in error.
            GuestError: the hypervisor did not do as asked, or it runs again, but its clock could not be set.
        """
        self._asleep = False
        await self._to_its_end(self._resume())

    async def _resume(self) -> None:
        async with self._turn:
            session = self._in({VMState.RUNNING, VMState.PAUSED, VMState.ERROR}, "vm_resume")
            before = VMState.PAUSED if self._state is VMState.RUNNING else self._state
            if self._state is VMState.RUNNING:
                if await session.vm.state() not in {VMState.PAUSING, VMState.PAUSED}:
                    return
                self._running("vm_resume")
                self._to(VMState.PAUSED)  # by a pause that was given up, and came about after all
                self._events.emit("vmPause")
            self._to(VMState.RESUMING)
            try:
                await session.vm.resume()
            except OVMError:
                if self._state is VMState.RESUMING:
                    self._to(before)
                raise
            if self._state is not VMState.RESUMING:
                self._refuse("vm_resume")
            self._to(VMState.RUNNING)
            try:
                if session.profile.engine:
                    await self._sync_after_resume(session)
            finally:
                self._events.emit("vmResume")
                if self._care is not None:
                    self._care.look_soon()  # not before: a look keeps the guest from telling its time at once

    async def _sync_after_resume(self, session: Session) -> None:
        self._syncing = asyncio.create_task(session.sync_clock())
        try:
            await asyncio.wait({self._syncing})
            if not self._syncing.cancelled():
                self._syncing.result()
                self._in_background(session.kick_chrony())
        finally:
            self._syncing.cancel()
            self._syncing = None

    async def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
        """Keep the guest's memory on disk and end every process; the next :meth:`start` goes on from it.

        Containers go on where they were; who was connected to one has to connect again. A paused machine runs after
        that start. The memory goes with this machine as it is, and is removed by the next start in any case: if files,
        options, QEMU or the data disk have changed meanwhile, the guest boots, as after a power failure. What it had
        written by now is synced first. It takes up to ``memory_mib`` of disk.

        Once begun it is finished, even if the caller is cancelled; a :meth:`stop` meanwhile wins.

        Args:
            timeout_s: Seconds the hypervisor may take.

        Raises:
            UnsupportedError: it runs under vfkit, or shares a folder.
            StateError: it is neither running nor paused.
            SpaceError: the disk has no room for the memory.
            GuestError: the hypervisor could not do it. After an error the machine does what it did before.
            StopError: a helper could not be ended.
        """
        check_suspension(self._prepared)
        await self._to_its_end(self._suspend(timeout_s))
        keeper = self._keeper
        assert keeper is not None
        await asyncio.wait({keeper})
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            raise StopError("the machine could not be ended cleanly") from error

    async def _suspend(self, timeout_s: float) -> None:
        async with self._turn:
            session = self._in({VMState.RUNNING, VMState.PAUSED}, "suspend")
            before = self._state
            self._to(VMState.SAVING)
            self._saving = asyncio.current_task()
            for task in self._background:  # they would connect again
                task.cancel()
            try:
                await save(session, runs=before is VMState.RUNNING, timeout_s=timeout_s)
            except BaseException as error:
                if self._state is VMState.SAVING:
                    self._to(before)
                    self._attend(session)
                    if session.profile.engine and before is VMState.RUNNING:
                        self._in_background(session.settle())  # which may not have been done
                if isinstance(error, asyncio.CancelledError):
                    raise StateError("suspend: the machine was stopped meanwhile") from None
                raise
            finally:
                self._saving = None
            if self._state is not VMState.SAVING:
                self._refuse("suspend")
            self._is_suspended = True
            self._stop_wanted.set()

    async def _before_sleep(self) -> None:
        """A guest that runs into the host's sleep wakes with a clock that is wrong, and on macOS may hang."""
        if self._asleep or self._state in {VMState.RUNNING, VMState.RESUMING}:
            self._asleep = True  # before: who waits for us may give up, the pause goes on
            await self._to_its_end(self._pause())

    async def _after_wake(self) -> None:
        """What its user had paused stays paused."""
        ran = self._state is VMState.RUNNING
        if self._asleep:
            await self._to_its_end(self._resume())  # behind a pause that may still be under way
            self._asleep = False
        if ran and self._state is VMState.RUNNING and self._session is not None and self._session.profile.engine:
            await self.clocksync()
        if self._care is not None:
            self._care.look_soon()  # a gvproxy may hang since, or a network be another

    async def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's, verify it, and have chrony look at its servers now.

        The servers (pool.ntp.org, time.apple.com, time.windows.com) are not waited for.

        Raises:
            StateError: it is not running.
            GuestError: the guest cannot be reached, or its clock does not obey.
        """
        session = self._managed("clocksync")
        result = await session.sync_clock()
        self._in_background(session.kick_chrony())
        return result

    async def export_port(
        self, host_port: int, guest_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1"
    ) -> Forward:
        """Lead a port of the host to a port of the guest; returns what was bound.

        Args:
            host_port: 0 picks a free one.
            guest_port: A port of the guest, which a container's published port is too.
            protocol: ``tcp`` or ``udp``.
            address: Which of the host's addresses to bind; this host alone can reach the default.

        Raises:
            OptionError: a port or the address is none.
            StateError: it is not running.
            PortError: the host port is taken, or needs privileges.
        """
        _check_forward(host_port, protocol, address, lowest=0)
        check_port("guest_port", guest_port)
        return await self._running("export_port").export(host_port, guest_port, protocol, address)

    async def unexport_port(self, host_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1") -> None:
        """Close what :meth:`export_port` opened.

        Raises:
            OptionError: the port or the address is none.
            StateError: it is not running.
            PortError: it was not exported.
        """
        _check_forward(host_port, protocol, address, lowest=1)
        await self._running("unexport_port").unexport(host_port, protocol, address)

    def ports(self) -> tuple[Forward, ...]:
        """What is open on the host for this machine: exported ports, and those of containers.

        Raises:
            StateError: it is not running.
        """
        return tuple(self._in({VMState.RUNNING, VMState.PAUSED}, "ports").forwards.values())

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        on_stdout: Callable[[bytes], object] | None = None,
        on_stderr: Callable[[bytes], object] | None = None,
    ) -> ExecResult:
        """Run a command as root in the guest. A status other than 0 is a result, not an error.

        Args:
            argv: The command and its arguments; no shell comes between.
            stdin: What it reads.
            environment: Variables besides the guest's own.
            timeout_s: Seconds after which it is ended; no limit by default.
            on_stdout: Gets standard output piece by piece, which is then not collected.
            on_stderr: Likewise for standard error.

        Raises:
            OptionError: ``argv`` is no list of words.
            StateError: it is not running.
            ExecTimeout: it ran too long.
            GuestError: the guest cannot be reached.
        """
        if isinstance(argv, str) or not argv:
            raise OptionError("argv is the list of a command and its arguments", hint='for a shell: ["sh", "-c", "…"]')
        return await self._managed("exec").ssh.exec(
            argv, stdin=stdin, environment=environment, timeout_s=timeout_s, on_stdout=on_stdout, on_stderr=on_stderr
        )

    @contextlib.asynccontextmanager
    async def process(
        self, argv: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> AsyncIterator[asyncssh.SSHClientProcess[bytes]]:
        """A command running as root in the guest, with its three streams; ended on the way out.

        Raises:
            StateError: it is not running.
            GuestError: the guest cannot be reached.
        """
        async with self._managed("process").ssh.process(argv, environment=environment) as process:
            yield process

    async def prune(self, *, everything: bool = False, volumes: bool = False) -> Pruned:
        """Have podman remove what nothing uses, and give the host back the room that frees in ``data.img``.

        Containers that do not run, pods and networks nobody is in, and images without a name go.

        Args:
            everything: Every image that no container uses goes too.
            volumes: So do volumes that no container uses, with what is in them.

        Raises:
            StateError: it is not running.
            GuestError: the guest cannot be reached, or podman did not do it.
        """
        session = self._managed("prune")
        return await prune(session.sockets.podman, session.ssh, everything=everything, volumes=volumes)

    async def verify(self) -> list[FileState]:
        """Compare the files it runs from with the digests they had when they were made; it may be running."""
        return await verify(self.options.target_dir)

    async def reset_path(self, *, data: bool = False) -> None:
        """Restore every file of ``target_dir`` from its origin, whatever the versions say.

        Args:
            data: Remove the data disk too, and with it every image, container and volume.

        Raises:
            StateError: it is not stopped.
            InUseError: another process runs it.
            InputError: an origin cannot be used any more; nothing was changed.
            SpaceError: the disk is too small; says what is needed.
        """
        if self._keeper is not None and not self._keeper.done():
            raise StateError("the files of a running machine cannot be restored", hint="stop() it first")
        await prepare.reset(self.options, with_data=data)

    def on(self, name: EventName, listener: Listener) -> Callable[[], None]:
        """Call ``listener``, plain or async, at each event of that name; returns what removes it again.

        ``ready``, ``close``, ``vmPause`` and ``vmResume`` pass nothing, ``error`` passes the exception, ``health`` an
        :class:`ovm.Health`.

        Raises:
            OptionError: there is no event of that name.
        """
        return self._events.on(name, listener)

    def events(self) -> AsyncIterator[Event]:
        """Every event from this call on, in order; each iterator has a queue of its own."""
        return self._events.stream()

    # -- inside

    def _running(self, call: str) -> Session:
        return self._in({VMState.RUNNING}, call)

    def _managed(self, call: str) -> Session:
        """A running guest that has an sshd to do it by."""
        session = self._running(call)
        if not session.profile.engine:
            raise UnsupportedError(f"{call}: the guest is bare, nothing in it could do that")
        return session

    def _in(self, states: set[VMState], call: str) -> Session:
        if self._session is None or self._state not in states:
            self._refuse(call)
        return self._session

    def _refuse(self, call: str) -> NoReturn:
        hints = {VMState.STOPPED: "start() it first", VMState.PAUSED: "vm_resume() it first"}
        raise StateError(f"{call}: the machine is {self._spoken()}", hint=hints.get(self._state, "wait for its ready"))

    def _spoken(self) -> str:
        return self._state.removeprefix("VirtualMachineState").lower()

    def _to(self, state: VMState) -> None:
        assert may_follow(self._state, state), f"{self._state} → {state}"
        log.debug("%s → %s", self._state, state)
        self._state = state

    def _changed(self, now: Health) -> None:
        self._events.emit("health", health=now)

    def _tell(self, step: str) -> None:
        log.info("stopping: %s", step)
        self._call_progress(step)

    def _done(self, stage: str) -> None:
        self._stages.append(Stage(stage, (time.monotonic() - self._began) * 1000))
        self._call_progress(stage)

    def _call_progress(self, step: str) -> None:
        for listener in self._progress:
            try:
                listener(step)
            except Exception:
                log.exception("who was to be told of the progress failed")

    def _hear(self, what: Happening, words: str) -> None:
        if self._state is VMState.STOPPING and what in {Happening.FAILED, Happening.OUT_OF_SPACE}:
            log.warning("the guest cannot shut down: %s", words)
            self._force_wanted.set()
        if what is Happening.POWERED_OFF:
            self._powered_off.set()
        if what is Happening.REBOOTED:
            # One reboot makes several resets, at their own pace on a slow host: the kernel tries every way it knows,
            # and SeaBIOS, run a second time, starts over. So a boot that has not said a word yet has not fallen.
            if self._state is VMState.STARTING and (self._session is None or self._session.channel.stages):
                self._fallen.set()
            if self._session is None or self._state is not VMState.RUNNING:
                return  # on its way out, a reset changes nothing for us
            self._session.channel.expect_boot()  # now, not later: its first line may be the next thing to arrive
            if may_follow(self._state, VMState.STARTING):  # not on its way out
                self._to(VMState.STARTING)
        self._happened.put_nowait((what, words))

    async def _to_its_end(self, change: Coroutine[Any, Any, None]) -> None:
        """A change of the state, finished once begun, even if its caller is cancelled."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def first_error(error: BaseException) -> BaseException:
    """The first real error of a task group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _check_forward(host_port: int, protocol: str, address: str, *, lowest: int) -> None:
    check_port("host_port", host_port, lowest=lowest)
    check_address("address", address)
    if protocol not in {"tcp", "udp"}:
        raise OptionError(f"protocol={protocol!r} is unknown", hint="tcp or udp")
