"""The life of a machine: one task from the first step of a start to its ``close``, and the only writer of its state."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from ovm import power
from ovm.disks.saved_state import Unfit, is_there
from ovm.errors import (
    GuestError,
    HelperExited,
    NotReadyError,
    OVMError,
    PortError,
    StartError,
    StateError,
    StopError,
    UnsupportedError,
    first_error,
)
from ovm.hypervisors import Happening
from ovm.machine import health, prepare
from ovm.machine.boot import (
    BLAME_WAIT_S,
    blame,
    boot_error,
    come_up,
    explain,
    find_panic,
    go_on,
    halt_error,
    power_on,
)
from ovm.machine.monitor import Care
from ovm.machine.pause import Standstill
from ovm.machine.running import Session
from ovm.machine.shutdown import Shutdown, cut_power, shut_down
from ovm.machine.suspend import Recall
from ovm.model.defaults import STOP_TIMEOUT_S
from ovm.model.events import Events
from ovm.model.info import Health, Stage
from ovm.model.states import VMState, may_follow
from ovm.paths import TargetPaths
from ovm.process.child import Child
from ovm.process.supervise import first_exit, race

log = logging.getLogger(__name__)

FIRST_WORD_S = 60.0
"""A kernel that has run nothing of ours by then is taken to hang, and is given one more try."""
RESTART_AGAIN_S = 60.0
"""A machine whose network is lost again so soon after a restart is not restarted once more."""
ROOM_AGAIN_S = 5.0
"""How often it is looked whether the host has room again for a guest that stands still for want of it."""

_HALTS = {Happening.FAILED, Happening.OUT_OF_SPACE}
_TROUBLE = {*_HALTS, Happening.DISK_ERROR}

Progress = Callable[[str], object]


class Life:
    """Of one machine: from start to stop, any number of times."""

    def __init__(self, prepared: prepare.Prepared, events: Events) -> None:
        self.prepared = prepared
        self.events = events
        self.state = VMState.STOPPED
        self.session: Session | None = None
        self.care: Care | None = None
        self.stages: list[Stage] = []
        self.not_resumed = ""
        self.standstill = Standstill(self)
        self.background: set[asyncio.Task[None]] = set()
        """What is done beside, and ends with the session."""
        self._changes: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._resume_wanted = False
        self._progress: list[Progress] = []
        self._restarted_at = -math.inf
        self._began = 0.0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left of it."""
        return self._keeper is None or self._keeper.done()

    async def start(self, *, resume: bool, timeout_s: float, progress: Progress | None) -> None:
        """As :meth:`ovm.OVM.start` promises."""
        if not self.is_over:
            raise StateError(f"the machine is {self.spoken()} already", hint="stop() it first")
        self._timeout_s = timeout_s
        self._restarted_at = -math.inf
        self.stop_wanted, self._force_wanted = asyncio.Event(), asyncio.Event()
        self._stop_timeout_s = STOP_TIMEOUT_S
        self._progress = [] if progress is None else [progress]
        self._resume_wanted, self.not_resumed = resume, ""
        # one look at a name; to wait for a thread here would let a second start in
        restoring = resume and is_there(TargetPaths(self.prepared.options.target_dir))
        started = self._begin(VMState.RESTORING if restoring else VMState.STARTING)
        self._keeper = asyncio.create_task(self._keep(started), name=f"life of {self.prepared.options.target_dir}")
        try:
            await asyncio.shield(started)
        except asyncio.CancelledError:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
            raise

    async def stop(self, *, force: bool, timeout_s: float, progress: Progress | None) -> None:
        """As :meth:`ovm.OVM.stop` promises."""
        keeper = self._keeper
        if keeper is None or keeper.done():
            return
        first = not self.stop_wanted.is_set()
        if first:
            self._stop_timeout_s = timeout_s
            self._progress = []
        if progress is not None:
            self._progress.append(progress)
        self.stop_wanted.set()
        if force:
            self._force_wanted.set()
        if first and self.session is None:
            keeper.cancel()
        await self.wait_ended("the machine could not be stopped cleanly")

    async def wait_closed(self) -> None:
        """As :meth:`ovm.OVM.wait_closed` promises."""
        if self._keeper is not None:
            await asyncio.wait({self._keeper})

    async def wait_ended(self, failure: str) -> None:
        """Until it is over.

        Raises:
            StopError: ``failure``; a helper could not be ended.
        """
        keeper = self._keeper
        assert keeper is not None
        await asyncio.wait({keeper})
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            raise StopError(failure) from error

    def _begin(self, first: VMState = VMState.STARTING) -> asyncio.Future[None]:
        """From Stopped to ``first``, with nothing of an earlier life; returns what is done once it is ready."""
        self._began = time.monotonic()
        self.stages = []
        self._powered_off, self._fallen = asyncio.Event(), asyncio.Event()
        self._happened: asyncio.Queue[tuple[Happening, str]] = asyncio.Queue()
        self._halted: asyncio.Queue[tuple[Happening, str]] = asyncio.Queue()
        self._network_is_lost = self._fell_early = False
        self._trouble = ""
        self.standstill.begin()
        self.to(first)
        return asyncio.get_running_loop().create_future()

    async def _keep(self, started: asyncio.Future[None]) -> None:
        """The life of one start, from its first step to its ``close``, and of the next if its network was lost."""
        self._tried_again = False
        while True:
            error = await self._outlive(started)
            if self._fell_early and not self._tried_again and not self.stop_wanted.is_set():
                log.warning("the guest's kernel fell before its first word, so it is started once more: %s", error)
                self._tried_again, _ = True, self._begin()
                continue
            if isinstance(error, Unfit) and not self.stop_wanted.is_set():
                self._resume_wanted, self.not_resumed, _ = False, str(error), self._begin()
                continue
            told = error if isinstance(error, OVMError) or error is None else OVMError(f"internal error: {error!r}")
            if told is not None and not self.stop_wanted.is_set():
                self.events.emit("error", told)
            self.events.emit("close")
            if not started.done():
                if error is None:
                    started.cancel()
                else:
                    started.set_exception(error)
                    started.exception()  # start() may have been cancelled meanwhile and never look
            elif error is not None and self.stop_wanted.is_set():
                raise error  # to stop()'s caller
            if not self._is_to_restart():
                return
            log.warning("starting again, because the network was lost")
            self._restarted_at = time.monotonic()
            started = self._begin()

    def _is_to_restart(self) -> bool:
        if not self._network_is_lost or self.stop_wanted.is_set() or self.prepared.options.network_loss != "restart":
            return False
        return time.monotonic() - self._restarted_at > RESTART_AGAIN_S

    async def _outlive(self, started: asyncio.Future[None]) -> BaseException | None:
        """One life, to its end; returns what it died of."""
        error: BaseException | None = None
        try:
            await self._live(started)
        except asyncio.CancelledError:
            if self.stop_wanted.is_set() and not started.done():
                error = StartError("the machine was stopped before it was ready")
        except BaseExceptionGroup as group:
            error = first_error(group)
        except Exception as failure:  # noqa: BLE001 - told to start()'s caller or to the listeners
            error = failure
            if isinstance(failure, OSError) and not started.done():
                error = StartError(f"a file or socket cannot be used: {failure}")
                error.__cause__ = failure
        for task in self.background:
            task.cancel()
        self.session = self.care = None
        self.to(VMState.STOPPED)
        if error is not None and not isinstance(error, OVMError):
            log.error("the machine failed", exc_info=error)
        return error

    async def _live(self, started: asyncio.Future[None]) -> None:
        async with contextlib.AsyncExitStack() as stack:
            recall = Recall(wanted=self._resume_wanted, given_up=self._boots_instead)
            self._resume_wanted = False  # of what comes after this start, nothing goes on from what is there now
            session = await stack.enter_async_context(
                power_on(self.prepared, recall=recall, step=self._done, watcher=self._hear)
            )
            if self.prepared.options.pause_on_sleep:
                await stack.enter_async_context(power.watch(self.standstill.before_sleep, self.standstill.after_wake))
            if recall.record is None:
                await self._come_up(session)
            else:
                await self._go_on(session, recall)
            self.session = session
            self.care = Care(
                session, self.prepared.driver, is_running=lambda: self.state is VMState.RUNNING, changed=self._changed
            )
            self.to(VMState.RUNNING)
            self.events.emit("ready")
            started.set_result(None)
            self.attend(session)
            try:
                await self._stay(session)
            finally:
                # also when the event loop itself is ending: it waits for us
                await self._leave(session)

    def attend(self, session: Session) -> None:
        """What is done for a machine all the time that it runs."""
        if session.profile.engine:
            self.in_background(session.keep_attached())
        if self.care is not None:
            self.in_background(self.care.keep_looking())

    async def _leave(self, session: Session) -> None:
        """Shut the guest down; of one whose memory is kept, only the power is cut."""
        await self.standstill.give_up_saving()
        for task in self.background:
            task.cancel()
        if self.standstill.is_suspended:
            await cut_power(session)
            return
        self.to(VMState.STOPPING)
        await shut_down(
            session,
            Shutdown(
                tell=self._tell,
                force_wanted=self._force_wanted,
                trouble=lambda: self._trouble,
                timeout_s=self._stop_timeout_s,
            ),
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
        except NotReadyError as late:
            raise self._with_trouble(late) from None
        heard = (
            Stage(
                f"guest: {s.name}",
                (s.heard_at - self._began) * 1000,
                None if s.uptime_s is None else s.uptime_s * 1000,
            )
            for s in session.channel.stages
        )
        self.stages = sorted([*self.stages, *heard], key=lambda stage: stage.ms)
        if session.profile.engine:
            self.in_background(session.settle())

    async def _go_on(self, session: Session, recall: Recall) -> None:
        """Have the guest go on from its memory.

        Raises:
            Unfit: it does not; it can boot instead.
        """
        try:
            lost = await race(
                self._go_on_or_halt(session, recall), session.children, stage="resume", timeout_s=self._timeout_s
            )
        except (OVMError, BaseExceptionGroup) as error:
            told = first_error(error)
            if not isinstance(told, OVMError):
                raise
            raise Unfit(f"the guest did not go on: {told}") from error
        for port in lost:
            self.events.emit("error", port)
        if session.profile.engine:
            self.in_background(session.settle())  # it may have been suspended before it was

    def _boots_instead(self, why: str) -> None:
        self.not_resumed = why
        self.to(VMState.STARTING)

    async def _come_up_or_fall(self, session: Session) -> None:
        async with asyncio.TaskGroup() as tasks:
            failures = [tasks.create_task(failure) for failure in (self._fall(session), self._halt(session))]
            await come_up(session, step=self._done)
            for failure in failures:
                failure.cancel()

    async def _go_on_or_halt(self, session: Session, recall: Recall) -> list[PortError]:
        async with asyncio.TaskGroup() as tasks:
            halting = tasks.create_task(self._halt(session))
            lost = await go_on(session, recall, step=self._done)
            halting.cancel()
        return lost

    async def _halt(self, session: Session) -> NoReturn:
        """Fail as soon as the hypervisor stops the guest before it is ready: nobody could resume it.

        Raises:
            StartError: always; with the last lines of the hypervisor's log.
        """
        raise await halt_error(session, *await self._halted.get())

    def _with_trouble(self, late: NotReadyError) -> NotReadyError:
        """``late``, with what the hypervisor has reported that may be the cause."""
        if not self._trouble:
            return late
        return NotReadyError(
            f"{late.message}: {self._trouble}", stage=late.stage, log_tail=late.log_tail, hint=late.hint
        )

    async def _fall(self, session: Session) -> None:
        """A guest that resets itself before its ready would do so again and again.

        Unless it was its kernel, before anything of ours ran: QEMU 7.2's TCG, emulating two processors, was seen to
        trip over an instruction that the kernel was patching, and once in a thousand boots to hang.
        """
        why = "the guest reset itself before it was ready"
        if self.session is None and not self._tried_again and session.profile.reports_boot:
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
        stop = asyncio.create_task(self.stop_wanted.wait())
        heard = asyncio.create_task(self._happened.get())
        rebooting: asyncio.Task[None] | None = None
        healing: asyncio.Task[None] | None = None
        dead: Child | None = None
        try:
            while True:
                waits = {task for task in (death, stop, heard, rebooting, healing) if task is not None}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if stop.done():
                    return
                if death.done():
                    culprit = await blame(session, death.result())
                    if culprit in session.children:  # else a reboot has replaced it meanwhile
                        if not await self._can_heal(session, culprit):
                            return
                        if rebooting is None or rebooting.done():  # a reboot heals it itself, in its own order
                            dead, healing = culprit, asyncio.create_task(self._heal(culprit))
                    death = asyncio.create_task(first_exit(c for c in session.children if c is not culprit))
                if healing is not None and healing.done():
                    healing.result()
                    dead = healing = None
                    death = _watch_all(session, death)
                if rebooting is not None and rebooting.done():
                    rebooting.result()
                    rebooting = None
                    if healing is None:
                        death = _watch_all(session, death)
                if heard.done():
                    what, words = heard.result()
                    heard = asyncio.create_task(self._happened.get())
                    if what is Happening.REBOOTED:
                        # the reboot restores the network anew: two at once would end each other's gvproxy
                        await _overtake(rebooting, healing)
                        rebooting = asyncio.create_task(self._come_up_again(session, dead))
                        dead = healing = None
                    elif what is Happening.FAILED and rebooting is not None:
                        self._force_wanted.set()  # a guest that is stopped cannot shut down
                        raise await halt_error(session, what, words)
                    elif what in _HALTS:
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
            if self.prepared.driver.can_replug:
                return True
            self._network_is_lost = True
        elif await self._guest_powered_off(culprit):
            log.info("the guest powered itself off")
            return False
        raise await culprit.exited("running")

    async def _fails_of_network(self, session: Session, gvproxy: Child) -> bool:
        """Whether a reboot has failed because ``gvproxy`` died, and the machine can live on; raises as _can_heal."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BLAME_WAIT_S):  # its death may be noticed after what it made fail
                await gvproxy.wait()
        if gvproxy.running or await blame(session, gvproxy) is not gvproxy:
            return False
        return await self._can_heal(session, gvproxy)

    async def _heal(self, gvproxy: Child) -> None:
        assert self.care is not None
        try:
            lost = await self.care.heal(gvproxy)
        except HelperExited:
            self._network_is_lost = True
            raise
        for port in lost:
            self.events.emit("error", port)

    def _fail(self, what: Happening, words: str) -> None:
        """The hypervisor has stopped the guest on its own account."""
        self.to(VMState.ERROR)
        hint = "stop() it; the log of the hypervisor may tell more"
        if what is Happening.OUT_OF_SPACE:
            hint = "make room on the host's disk: it goes on by itself then, or at once after vm_resume()"
        error = GuestError(f"the virtual machine was stopped by its hypervisor: {words}", hint=hint)
        self.events.emit("error", error)
        if self.care is not None:
            self.care.ails(error.message)
        if what is Happening.OUT_OF_SPACE:
            self.in_background(self._go_on_with_room())

    async def _go_on_with_room(self) -> None:
        """Until the host has room again for what the guest wants to write, or somebody else resumes or stops it."""
        while self.state is VMState.ERROR:
            if await health.has_room(self.prepared.options):
                with contextlib.suppress(OVMError):
                    await self.standstill.go_on()
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

    async def _come_up_again(self, session: Session, dead_gvproxy: Child | None) -> None:
        """The guest has reset itself. A gvproxy that dies meanwhile is replaced, as ``dead_gvproxy`` is at first."""
        self._began, self.stages = time.monotonic(), []
        if panic := await find_panic(session):
            self.events.emit("error", panic)
        try:
            # before the ports are closed: while gvproxy is being replaced, that would wait for it
            if dead_gvproxy is not None:
                await self._heal(dead_gvproxy)
            await session.guest_was_reset()
            await self._come_up_by_any_gvproxy(session)
        except Exception:
            self._force_wanted.set()  # there is nothing in it to shut down
            raise
        self.to(VMState.RUNNING)
        self.events.emit("ready")

    async def _come_up_by_any_gvproxy(self, session: Session) -> None:
        while True:
            gvproxy = session.network.child
            try:
                await self._come_up(session)
            except Exception:
                if not await self._fails_of_network(session, gvproxy):
                    raise
            else:
                return
            await self._heal(gvproxy)

    def running(self, call: str) -> Session:
        """The session, if it runs; else ``call`` is refused."""
        return self.in_({VMState.RUNNING}, call)

    def managed(self, call: str) -> Session:
        """A running guest that has an sshd to do it by."""
        session = self.running(call)
        if not session.profile.engine:
            raise UnsupportedError(f"{call}: the guest is bare, nothing in it could do that")
        return session

    def in_(self, states: set[VMState], call: str) -> Session:
        """The session, if it is in one of ``states``; else ``call`` is refused."""
        if self.session is None or self.state not in states:
            self.refuse(call)
        return self.session

    def refuse(self, call: str) -> NoReturn:
        """Say that it cannot be done now.

        Raises:
            StateError: always.
        """
        hints = {VMState.STOPPED: "start() it first", VMState.PAUSED: "vm_resume() it first"}
        raise StateError(f"{call}: the machine is {self.spoken()}", hint=hints.get(self.state, "wait for its ready"))

    def spoken(self) -> str:
        """The state, in a word for people."""
        return self.state.removeprefix("VirtualMachineState").lower()

    def to(self, state: VMState) -> None:
        """Change the state; nobody else does."""
        assert may_follow(self.state, state), f"{self.state} → {state}"
        log.debug("%s → %s", self.state, state)
        self.state = state

    def _changed(self, now: Health) -> None:
        self.events.emit("health", health=now)

    def _tell(self, step: str) -> None:
        log.info("stopping: %s", step)
        self._call_progress(step)

    def _done(self, stage: str) -> None:
        self.stages.append(Stage(stage, (time.monotonic() - self._began) * 1000))
        self._call_progress(stage)

    def _call_progress(self, step: str) -> None:
        for listener in self._progress:
            try:
                listener(step)
            except Exception:
                log.exception("who was to be told of the progress failed")

    def _hear(self, what: Happening, words: str) -> None:
        if what is Happening.DISK_ERROR and not self._trouble:  # the first will do: there may be one for each request
            log.warning("%s; the guest runs on", words)
        if what is Happening.RESUMED:
            self._trouble = ""
        if what in _TROUBLE:
            self._trouble = words
        if what is Happening.DISK_ERROR:
            return
        if self.session is None and what in _HALTS:  # and below, if the guest is ready before this is noticed
            self._halted.put_nowait((what, words))
        if self.state is VMState.STOPPING and what in _HALTS:
            if not self._force_wanted.is_set():
                log.warning("the guest cannot shut down: %s", words)
            self._force_wanted.set()
        if what is Happening.POWERED_OFF:
            self._powered_off.set()
        if what is Happening.REBOOTED:
            # One reboot makes several resets, at their own pace on a slow host: the kernel tries every way it knows,
            # and SeaBIOS, run a second time, starts over. So a boot that has not said a word yet has not fallen.
            if self.state is VMState.STARTING and (self.session is None or self.session.channel.stages):
                self._fallen.set()
            if self.session is None or self.state is not VMState.RUNNING:
                return  # on its way out, a reset changes nothing for us
            self.session.channel.expect_boot()  # now, not later: its first line may be the next thing to arrive
            if may_follow(self.state, VMState.STARTING):  # not on its way out
                self.to(VMState.STARTING)
        self._happened.put_nowait((what, words))

    async def to_its_end(self, change: Coroutine[Any, Any, None]) -> None:
        """A change of the state, finished once begun, even if its caller is cancelled."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Have it done beside, for as long as the session lasts."""
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)


async def _overtake(*tasks: asyncio.Task[None] | None) -> None:
    overtaken = {task for task in tasks if task is not None}
    for task in overtaken:
        task.cancel()
    if overtaken:
        await asyncio.wait(overtaken)


def _watch_all(session: Session, before: asyncio.Task[Child]) -> asyncio.Task[Child]:
    before.cancel()
    return asyncio.create_task(first_exit(session.children))
