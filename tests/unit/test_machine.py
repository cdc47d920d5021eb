"""The machine's own rules, on a stage without a virtual machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ovm.errors import (
    GuestError,
    HelperExited,
    NotReadyError,
    OptionError,
    OVMError,
    PortError,
    StartError,
    StateError,
    StopError,
    UntrustedError,
)
from ovm.hypervisors import Happening
from ovm.machine import boot, prepare
from ovm.machine.collaborators import Collaborators
from ovm.machine.profiles import PROFILES
from ovm.machine.vm import OVM
from ovm.model.options import Options
from ovm.model.states import VMState
from ovm.paths import TargetPaths
from ovm.process.child import Child


class Children:
    """The helpers of a stage as they are now: gvproxy may be replaced."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __iter__(self):
        return iter((self.stage.child, self.stage.gvproxy))


class Stage:
    """What a machine runs on, played by this class: power, guest and hypervisor do as a test says."""

    def __init__(self, tmp_path: Path) -> None:
        self.booting = asyncio.Event()
        self.ready = asyncio.Event()
        self.pausing = asyncio.Event()
        self.may_pause = asyncio.Event()
        self.may_pause.set()
        self.trouble: Exception | None = None
        self.said: list[str] = []
        self.network = SimpleNamespace(child=None)
        self.powered = self.powers = 0
        self.reboots_expected = 0
        self.tmp_path = tmp_path
        self.child: Child | None = None
        self.gvproxy: Child | None = None
        self.reached: list[bool] = []
        self.lost: list[PortError] = []
        self.restoring = asyncio.Event()
        self.may_restore = asyncio.Event()
        self.may_restore.set()
        self.recalled: object | None = None
        self.can_replug = True

    # the hypervisor
    async def pause(self) -> None:
        self.pausing.set()
        await self.may_pause.wait()
        if self.trouble:
            raise self.trouble

    resume = pause

    async def state(self) -> VMState:
        return VMState.RUNNING

    # the boot
    @contextlib.asynccontextmanager
    async def power_on(self, prepared, *, recall, step, watcher):
        process = await asyncio.create_subprocess_exec("sleep", "60")
        log_path = self.tmp_path / "qemu.log"
        log_path.touch()
        self.child = Child("qemu", process, log_path)
        await self.begin_gvproxy()
        self.powered += 1
        self.powers += 1
        recall.record = self.recalled
        self.watcher = watcher

        def expect_boot() -> None:
            self.reboots_expected += 1

        async def no_words() -> None:
            pass

        async def nothing() -> None:
            self.said.append("reset")

        try:
            yield SimpleNamespace(
                options=prepared.options,
                profile=PROFILES[prepared.options.guest],
                vm=self,
                guard=None,
                network=self.network,
                restore_network=self.restore_network,
                children=Children(self),
                channel=SimpleNamespace(stages=[], expect_boot=expect_boot, last_words=no_words),
                console_log=self.tmp_path / "console.log",
                console_read=0,
                guest_was_reset=nothing,
                forwards={},
            )
        finally:
            await self.child.end(grace_s=0)
            await self.gvproxy.end(grace_s=0)
            self.powered -= 1

    async def begin_gvproxy(self) -> None:
        self.gvproxy = self.network.child = Child("gvproxy", await asyncio.create_subprocess_exec("sleep", "60"))

    async def restore_network(self, *, reach: bool) -> list[PortError]:
        self.restoring.set()
        self.reached.append(reach)
        await self.may_restore.wait()
        await self.begin_gvproxy()
        return self.lost

    # the host's sleep
    @contextlib.asynccontextmanager
    async def watch(self, on_sleep, on_wake):
        self.on_sleep, self.on_wake = on_sleep, on_wake
        yield

    async def come_up(self, session, *, step) -> None:
        self.booting.set()
        await self.ready.wait()
        if self.trouble:
            raise self.trouble

    async def shut_down(self, session, how) -> None:
        self.said.append("forced" if how.force_wanted.is_set() else "asked")
        if self.trouble:
            raise self.trouble

    async def blame(self, session, noticed) -> Child:
        return noticed

    async def explain(self, session, noticed, powered_off):
        return await boot.explain(session, noticed, powered_off) if not self.child.running else noticed

    def machine(self, options: Options, **others: Any) -> OVM:
        """A stopped machine on this stage; ``others`` replace what the stage plays."""
        played = {name: getattr(self, name) for name in ("power_on", "come_up", "shut_down", "blame", "explain")}
        return OVM(
            prepare.Prepared(options=options, files=None, driver=SimpleNamespace(can_replug=self.can_replug)),
            Collaborators(**{**played, "watch_power": self.watch, "blame_wait_s": 0.02, **others}),
        )


@pytest.fixture
async def stage(tmp_path):
    return Stage(tmp_path)


@pytest.fixture
def options(tmp_path):
    return Options.of(
        origin_path={name: f"/o/{name}" for name in ("gvproxy", "kernel", "initrd", "rootfs")},
        versions=dict.fromkeys(("gvproxy", "kernel", "initrd", "rootfs"), "1"),
        **{name: tmp_path / name for name in ("target_dir", "socket_dir", "log_dir", "ssh_key_dir")},
        guest="bare",
    )


def heard(machine: OVM) -> OVM:
    """``machine.heard`` lists its events."""
    machine.heard = []
    for name in ("ready", "close", "vmPause", "vmResume"):
        machine.on(name, lambda name=name: machine.heard.append(name))
    machine.on("error", lambda error: machine.heard.append(error.code))
    return machine


@pytest.fixture
async def vm(stage, options):
    """A stopped machine; ``vm.heard`` lists its events."""
    machine = heard(stage.machine(options))
    yield machine
    stage.trouble = None
    stage.may_pause.set()
    with contextlib.suppress(OVMError):
        async with asyncio.timeout(5):
            await machine.stop(force=True)


@pytest.fixture
async def running(vm, stage):
    stage.ready.set()
    async with asyncio.timeout(5):
        await vm.start()
    return vm


async def test_a_life(vm, stage):
    """A machine starts, says ready, stops, says close, and can be started again."""
    stage.ready.set()
    for _ in range(2):
        async with asyncio.timeout(5), vm:
            assert vm.state is VMState.RUNNING
            assert (await vm.vm_state()).can_pause
        assert vm.state is VMState.STOPPED
        assert stage.powered == 0
    assert vm.heard == ["ready", "close"] * 2
    assert stage.said == ["asked"] * 2


CALLS = {
    "info": lambda vm: vm.info,
    "vm_pause": lambda vm: vm.vm_pause(),
    "vm_resume": lambda vm: vm.vm_resume(),
    "clocksync": lambda vm: vm.clocksync(),
    "export_port": lambda vm: vm.export_port(0, 80),
    "unexport_port": lambda vm: vm.unexport_port(1),
    "ports": lambda vm: vm.ports(),
    "exec": lambda vm: vm.exec(["true"]),
    "process": lambda vm: vm.process(["true"]).__aenter__(),
}


async def ask(vm: OVM, call: str) -> None:
    result = CALLS[call](vm)
    if asyncio.iscoroutine(result):
        await result


@pytest.mark.parametrize("call", CALLS)
async def test_calls_are_refused_while_stopped(vm, call):
    """What needs a running machine is a StateError while it is stopped, naming the call and what to do."""
    with pytest.raises(StateError, match=f"{call}: the machine is stopped") as caught:
        await ask(vm, call)
    assert caught.value.hint == "call start() first"


@pytest.mark.parametrize("call", ["clocksync", "export_port", "exec", "process"])
async def test_calls_are_refused_while_paused(running, call):
    """A paused machine is not asked what it could not answer, and the error says to resume it."""
    await running.vm_pause()
    with pytest.raises(StateError, match="the machine is paused") as caught:
        await ask(running, call)
    assert caught.value.hint == "call vm_resume() first"


@pytest.mark.parametrize("call", ["stop", "vm_state"])
async def test_what_is_fine_while_stopped(vm, call):
    """Stopping and asking for the state need no running machine."""
    await getattr(vm, call)()
    assert vm.state is VMState.STOPPED


async def test_a_second_start_is_refused(running):
    """A machine that runs cannot be started, and runs on."""
    with pytest.raises(StateError, match="already running"):
        await running.start()
    assert running.state is VMState.RUNNING


async def test_its_files_are_not_restored_under_it(running):
    """``reset_path`` is refused while the machine runs."""
    with pytest.raises(StateError, match="cannot be restored") as caught:
        await running.reset_path()
    assert "stop()" in caught.value.hint


async def test_a_start_that_fails_tells_its_caller(vm, stage):
    """What went wrong in a start is raised there, told to listeners once, and leaves nothing behind."""
    stage.trouble = GuestError("podman does not answer")
    stage.ready.set()
    with pytest.raises(GuestError, match="podman does not answer"):
        await vm.start()
    assert vm.heard == ["guest-error", "close"]
    assert (vm.state, stage.powered) == (VMState.STOPPED, 0)


async def test_a_start_that_takes_too_long_is_given_up(vm):
    """A guest that is never ready is given up at the deadline."""
    with pytest.raises(StartError, match=r"not ready within 0\.02 s"):
        await vm.start(timeout_s=0.02)
    assert vm.state is VMState.STOPPED


async def test_a_hypervisor_that_dies_in_a_start_is_told(vm, stage):
    """A hypervisor that ends before the guest is ready is told at once, by its name."""
    start = asyncio.create_task(vm.start())
    async with asyncio.timeout(5):
        await stage.booting.wait()
        stage.child.process.kill()
        with pytest.raises(HelperExited, match="qemu ended unexpectedly"):
            await start


@pytest.mark.parametrize(
    ("what", "words", "hint"),
    [
        (Happening.FAILED, "QEMU stopped the guest: internal-error", "read the hypervisor's log: "),
        (Happening.OUT_OF_SPACE, "the disk ovm-data failed: No space left on device", "make room on the host's disk"),
    ],
)
async def test_a_guest_that_is_stopped_in_a_start_is_not_waited_for(vm, stage, what, words, hint):
    """A guest that its hypervisor stops before it is ready fails the start at once, with the cause."""
    start = asyncio.create_task(vm.start())
    async with asyncio.timeout(5):
        await stage.booting.wait()
        stage.child.log_path.write_text("KVM: entry failed, hardware error 0x80000021\n")
        stage.watcher(what, words)
        with pytest.raises(StartError, match=words) as caught:
            await start
    assert caught.value.hint.startswith(hint)
    assert caught.value.log_tail == ("KVM: entry failed, hardware error 0x80000021",)
    assert (vm.heard, vm.state, stage.powered) == (["start-failed", "close"], VMState.STOPPED, 0)


async def test_a_resumed_guest_that_is_stopped_is_not_waited_for(stage, options, tmp_path):
    """A guest that its hypervisor stops while it resumes from its saved state is booted at once, and it says why."""
    (tmp_path / "target_dir").mkdir()
    TargetPaths(tmp_path / "target_dir").suspended.write_text("{}")

    async def go_on(_session, _recall, *, step):
        stage.watcher(Happening.FAILED, "QEMU stopped the guest: internal-error")
        stage.recalled = None
        await asyncio.Event().wait()

    stage.recalled = object()
    stage.ready.set()
    async with asyncio.timeout(5), heard(stage.machine(options, go_on=go_on)) as vm:
        assert "internal-error" in vm._context.not_resumed


async def test_a_boot_that_is_late_tells_of_a_failed_disk(vm, stage):
    """A start that is given up at the deadline names the disk that failed meanwhile."""
    start = asyncio.create_task(vm.start(timeout_s=0.05))
    async with asyncio.timeout(5):
        await stage.booting.wait()
        stage.watcher(Happening.DISK_ERROR, "the disk ovm-data failed: Input/output error")
        with pytest.raises(NotReadyError, match=r"within 0\.05 s: the disk ovm-data failed: Input/output error"):
            await start


async def test_a_guest_that_is_stopped_in_a_reboot_is_not_waited_for(running, stage):
    """A guest that its hypervisor stops while it reboots ends the machine at once, with the cause, and no shutdown."""
    closed, errors = asyncio.Event(), []
    running.on("close", closed.set)
    running.on("error", errors.append)
    stage.ready.clear()
    stage.booting.clear()
    stage.watcher(Happening.REBOOTED, "guest-reset")
    async with asyncio.timeout(5):
        await stage.booting.wait()
        stage.watcher(Happening.FAILED, "QEMU stopped the guest: internal-error")
        await closed.wait()
    assert [error.message for error in errors] == [
        "the hypervisor stopped the guest before it was ready: QEMU stopped the guest: internal-error"
    ]
    assert stage.said == ["reset", "forced"]


async def test_a_cancelled_start_leaves_nothing(vm, stage):
    """Cancelling a start ends what it had begun, before the cancellation is over."""
    start = asyncio.create_task(vm.start())
    async with asyncio.timeout(5):
        await stage.booting.wait()
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
    assert (vm.state, stage.powered, vm.heard) == (VMState.STOPPED, 0, ["close"])


async def test_a_stop_at_once_ends_a_start(vm):
    """A stop in the very moment of a start, before that has begun anything, ends it like any other."""
    async with asyncio.timeout(5):
        start = asyncio.create_task(vm.start())
        stop = asyncio.create_task(vm.stop())
        with pytest.raises(StartError, match="stopped before it was ready"):
            await start
        await stop
    assert (vm.state, vm.heard) == (VMState.STOPPED, ["close"])


async def test_a_stop_ends_a_start(vm, stage):
    """A stop while it starts ends the start with an error, and is no failure of the stop."""
    start = asyncio.create_task(vm.start())
    async with asyncio.timeout(5):
        await stage.booting.wait()
        await vm.stop()
        with pytest.raises(StartError, match="stopped before it was ready"):
            await start
    assert vm.heard == ["close"]


async def test_a_hypervisor_that_dies_is_an_error_and_a_close(running, stage):
    """A hypervisor that ends by itself is told to listeners, once, and then the machine is stopped."""
    closed = asyncio.Event()
    running.on("close", closed.set)
    stage.child.process.kill()
    async with asyncio.timeout(5):
        await closed.wait()
    assert running.heard == ["ready", "helper-exited", "close"]
    assert running.state is VMState.STOPPED


async def test_a_stop_that_fails_is_told_to_its_caller(running, stage):
    """What goes wrong in a stop is raised from it as a StopError, and the machine counts as stopped."""
    stage.trouble = OSError("no")
    with pytest.raises(StopError) as caught:
        await running.stop()
    assert isinstance(caught.value.__cause__, OSError)
    assert running.heard == ["ready", "close"]
    await running.stop()


async def test_a_cancelled_stop_is_finished_all_the_same(running, stage):
    """Whoever asked for a stop may be cancelled; the stop goes on, and another caller can wait for it."""
    stop = asyncio.create_task(running.stop())
    await asyncio.sleep(0)
    stop.cancel()
    async with asyncio.timeout(5):
        await running.stop()
    assert running.state is VMState.STOPPED
    assert running.heard == ["ready", "close"]


async def test_two_stops_are_one(running, stage):
    """A second stop joins the first."""
    async with asyncio.timeout(5):
        await asyncio.gather(running.stop(), running.stop())
    assert (running.heard, stage.said) == (["ready", "close"], ["asked"])


async def test_pause_and_resume(running):
    """Pausing and resuming change the state, say so once, and are fine when repeated."""
    await running.vm_resume()
    await running.vm_pause()
    await running.vm_pause()
    assert running.state is VMState.PAUSED
    await running.vm_resume()
    assert running.state is VMState.RUNNING
    assert running.heard == ["ready", "vmPause", "vmResume"]


async def test_a_pause_that_fails_changes_nothing(running, stage):
    """If the hypervisor refuses, the machine runs on and the caller is told."""
    stage.trouble = GuestError("QEMU refused stop")
    with pytest.raises(GuestError):
        await running.vm_pause()
    assert running.state is VMState.RUNNING


@pytest.mark.parametrize("trouble", [None, GuestError("QEMU did not answer stop")])
async def test_a_stop_overtakes_a_pause(running, stage, trouble):
    """A pause that a stop has overtaken is an error of ours, and the machine is stopped."""
    stage.may_pause.clear()
    pause = asyncio.create_task(running.vm_pause())
    async with asyncio.timeout(5):
        await stage.pausing.wait()
        await running.stop()
        stage.trouble = trouble
        stage.may_pause.set()
        with pytest.raises(GuestError if trouble else StateError):
            await pause
    assert running.state is VMState.STOPPED
    assert "vmPause" not in running.heard


async def test_a_guest_that_reboots_is_ready_again(running, stage):
    """A guest that resets itself is starting until it is ready anew, and says so."""
    again = asyncio.Event()
    running.on("ready", again.set)
    stage.ready.clear()
    stage.watcher(Happening.REBOOTED, "guest-reset")
    assert running.state is VMState.STARTING
    stage.ready.set()
    async with asyncio.timeout(5):
        await again.wait()
    assert running.state is VMState.RUNNING
    assert running.heard == ["ready", "ready"]
    assert (stage.reboots_expected, stage.said) == (1, ["reset"])


async def reboot(vm: OVM, stage: Stage) -> asyncio.Event:
    """The guest has reset itself and boots; what is returned is set once it is ready."""
    again = asyncio.Event()
    vm.on("ready", again.set)
    stage.ready.clear()
    stage.booting.clear()
    stage.watcher(Happening.REBOOTED, "guest-reset")
    await stage.booting.wait()
    return again


async def test_a_gvproxy_that_dies_while_the_guest_reboots_is_replaced(running, stage):
    """The network is restored without reaching a guest that boots, and the machine is ready again."""
    async with asyncio.timeout(5):
        again = await reboot(running, stage)
        stage.booting.clear()
        stage.gvproxy.kill()
        await stage.booting.wait()
        assert running.state is VMState.STARTING
        stage.ready.set()
        await again.wait()
    assert (running.state, running.heard, stage.reached) == (VMState.RUNNING, ["ready", "ready"], [False])


async def test_a_gvproxy_whose_death_fails_the_reboot_first_is_replaced(running, stage):
    """A guest that cannot be reached because gvproxy is dead is waited for again by way of the new one."""
    async with asyncio.timeout(5):
        again = await reboot(running, stage)
        stage.booting.clear()
        stage.trouble = GuestError("podman does not answer")
        stage.ready.set()
        stage.gvproxy.kill()
        await stage.restoring.wait()
        stage.trouble = None
        await again.wait()
    assert (running.state, running.heard, stage.reached) == (VMState.RUNNING, ["ready", "ready"], [False])


async def test_a_guest_that_reboots_while_gvproxy_is_replaced_is_ready_again(running, stage):
    """A reboot ends the attempt to reach the guest; the network is restored once more, then the guest waited for."""
    stage.may_restore.clear()
    async with asyncio.timeout(5):
        stage.gvproxy.kill()
        await stage.restoring.wait()
        stage.restoring.clear()
        again = asyncio.Event()
        running.on("ready", again.set)
        stage.watcher(Happening.REBOOTED, "guest-reset")
        await stage.restoring.wait()
        stage.may_restore.set()
        await again.wait()
    assert (running.state, running.heard, stage.reached) == (VMState.RUNNING, ["ready", "ready"], [True, False])


async def test_a_gvproxy_is_replaced_again_after_a_reboot(running, stage):
    """After a reboot in which gvproxy was replaced, the new one is watched and replaced like any other."""
    async with asyncio.timeout(5):
        again = await reboot(running, stage)
        stage.booting.clear()
        stage.gvproxy.kill()
        await stage.booting.wait()
        stage.ready.set()
        await again.wait()
        stage.restoring.clear()
        stage.gvproxy.kill()
        await stage.restoring.wait()
    assert stage.reached == [False, True]
    assert running.state is VMState.RUNNING


async def test_a_hypervisor_that_dies_while_the_guest_reboots_is_told(running, stage):
    """A hypervisor that ends during a reboot ends the machine, and no gvproxy is blamed for it."""
    closed, errors = asyncio.Event(), []
    running.on("close", closed.set)
    running.on("error", errors.append)
    async with asyncio.timeout(5):
        await reboot(running, stage)
        stage.child.kill()
        await closed.wait()
    assert [error.message for error in errors] == ["qemu ended unexpectedly"]
    assert stage.reached == []


async def test_a_gvproxy_that_dies_while_the_machine_is_paused_is_replaced(running, stage):
    """The network is restored without reaching a guest that is paused; it is still paused then, and can be resumed."""
    await running.vm_pause()
    async with asyncio.timeout(5):
        healed = asyncio.Event()
        running.on("health", lambda health: healed.set() if health.ok else None)
        stage.gvproxy.kill()
        await healed.wait()
        assert running.state is VMState.PAUSED
        await running.vm_resume()
    assert (running.state, stage.reached) == (VMState.RUNNING, [False])


@pytest.fixture
def clock():
    """The time by which restarts are judged; a test sets it."""
    return SimpleNamespace(now=1000.0)


@pytest.fixture
async def unpluggable(stage, options, clock):
    """A machine that runs, and whose hypervisor knows one gvproxy only."""
    stage.can_replug = False
    stage.ready.set()
    machine = heard(stage.machine(options, clock=lambda: clock.now))
    async with asyncio.timeout(5), machine:
        yield machine


async def lose_network(vm: OVM, stage: Stage, *, until: str) -> None:
    """Kill gvproxy, and wait for the event ``until``."""
    told = asyncio.Event()
    remove = vm.on(until, told.set)
    stage.gvproxy.kill()
    async with asyncio.timeout(5):
        await told.wait()
    remove()


async def test_a_machine_is_restarted_when_its_network_is_lost(unpluggable, stage, clock):
    """It is closed and starts again by itself, however often, if there is a minute between."""
    for _ in range(2):
        await lose_network(unpluggable, stage, until="ready")
        clock.now += 61
    assert unpluggable.state is VMState.RUNNING
    assert unpluggable.heard == ["ready", *["helper-exited", "close", "ready"] * 2]


async def test_a_network_that_is_lost_again_at_once_ends_the_machine(unpluggable, stage, clock):
    """A machine that loses its network within a minute of a restart is not restarted once more."""
    await lose_network(unpluggable, stage, until="ready")
    clock.now += 59
    await lose_network(unpluggable, stage, until="close")
    await unpluggable.wait_closed()
    assert unpluggable.state is VMState.STOPPED
    assert unpluggable.heard == ["ready", *["helper-exited", "close"], "ready", *["helper-exited", "close"]]


async def test_a_lost_network_can_end_the_machine(stage, options):
    """A machine with network_loss="stop" is not restarted."""
    stage.can_replug = False
    stage.ready.set()
    machine = heard(stage.machine(dataclasses.replace(options, network_loss="stop")))
    async with machine:
        await lose_network(machine, stage, until="close")
        await machine.wait_closed()
    assert machine.heard == ["ready", "helper-exited", "close"]


@pytest.mark.parametrize("falls", [1, 2])
async def test_a_kernel_that_falls_is_retried_once(vm, stage, falls):
    """A reset before the guest's first message boots it again, as part of the same start; a second one fails it."""
    stage.tmp_path.joinpath("console.log").touch()
    start = asyncio.create_task(vm.start())
    async with asyncio.timeout(5):
        for _ in range(falls):
            await stage.booting.wait()
            stage.booting.clear()
            stage.watcher(Happening.REBOOTED, "guest-reset")
        if falls == 1:
            await stage.booting.wait()
            stage.ready.set()
            await start
        else:
            with pytest.raises(StartError, match="the guest reset itself before it was ready"):
                await start
    assert vm.heard == (["ready"] if falls == 1 else ["start-failed", "close"])


async def test_a_kernel_that_hangs_is_retried(stage, options):
    """A guest without a first message in time is booted again; the second time the start's deadline alone counts."""
    stage.tmp_path.joinpath("console.log").touch()
    vm = heard(stage.machine(options, first_word_s=0.02))
    with pytest.raises(NotReadyError):
        await vm.start(timeout_s=0.1)
    assert (vm.heard, stage.powers) == (["guest-not-ready", "close"], 2)


async def test_a_report_of_an_earlier_boot_does_not_fail_a_reboot(vm, stage):
    """A reset that came as the guest became ready is no fall of the boot that a later reset begins."""
    start = asyncio.create_task(vm.start())
    async with asyncio.timeout(5):
        await stage.booting.wait()
        stage.watcher(Happening.REBOOTED, "guest-reset")
        stage.ready.set()
        await start
        again = await reboot(vm, stage)
        stage.ready.set()
        await again.wait()
    assert vm.heard == ["ready", "ready"]


async def test_a_background_task_that_fails_is_an_event(running):
    """The machine runs on, and listeners get the error."""
    told = asyncio.Event()
    running.on("error", lambda _: told.set())

    async def fail() -> None:
        raise RuntimeError("unforeseen")

    running._context.in_background(fail())
    async with asyncio.timeout(5):
        await told.wait()
    assert (running.state, running.heard) == (VMState.RUNNING, ["ready", "ovm"])


async def test_a_reset_before_the_first_ready_is_part_of_the_boot(vm, stage):
    """A guest that resets while it boots is ready once, not twice."""
    start = asyncio.create_task(vm.start())
    async with asyncio.timeout(5):
        await stage.booting.wait()
        stage.watcher(Happening.REBOOTED, "guest-reset")
        stage.ready.set()
        await start
        for _ in range(10):
            await asyncio.sleep(0)
    assert (vm.heard, stage.said) == (["ready"], [])


async def test_a_reset_on_the_way_out_changes_nothing(stage, options):
    """A guest that resets itself while it is being stopped is stopped all the same."""

    async def shut_down(_session, _how) -> None:
        stage.watcher(Happening.REBOOTED, "guest-reset")

    stage.ready.set()
    async with asyncio.timeout(5), heard(stage.machine(options, shut_down=shut_down)) as machine:
        pass
    assert machine.heard == ["ready", "close"]


async def test_a_failed_disk_is_an_error(running, stage):
    """What the hypervisor tells of a failed disk is an error event, and the state says so."""
    told = asyncio.Event()
    running.on("error", lambda _: told.set())
    stage.watcher(Happening.FAILED, "the disk ovm-data failed: No space left on device")
    async with asyncio.timeout(5):
        await told.wait()
    assert running.state is VMState.ERROR


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda vm: vm.export_port(-1, 80), "host_port=-1"),
        (lambda vm: vm.export_port(65536, 80), "host_port=65536"),
        (lambda vm: vm.export_port(80, 0), "guest_port=0"),
        (lambda vm: vm.export_port("80", 80), "host_port='80'"),
        (lambda vm: vm.export_port(80, 80, protocol="sctp"), "protocol='sctp'"),
        (lambda vm: vm.export_port(80, 80, address="localhost"), "address='localhost'"),
        (lambda vm: vm.unexport_port(0), "host_port=0"),
        (lambda vm: vm.exec("ls -l"), "argv must be a list"),
        (lambda vm: vm.exec([]), "argv must be a list"),
    ],
)
async def test_what_makes_no_sense_is_refused_first(vm, call, words):
    """A port, address or command that is none is an OptionError, whatever the machine's state."""
    with pytest.raises(OptionError) as caught:
        await call(vm)
    assert words in caught.value.message


async def test_it_says_what_it_is(running):
    """A machine shows its directory and state."""
    assert repr(running) == f"<OVM {running.options.target_dir} Running>"


async def test_sockets_live_in_a_private_directory(vm):
    """The directory of the sockets is closed to others, even if it was there before and open."""
    vm.options.socket_dir.mkdir(mode=0o777)
    prepare.make_directories(vm.options)
    assert vm.options.socket_dir.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's directory")
@pytest.mark.parametrize(("foreign", "words"), [("", "ovm-0/default belongs to"), ("..", "ovm-0 belongs to")])
async def test_nobody_else_can_lay_out_the_socket_directory(vm, short_path, foreign, words):
    """A socket directory that another user made, or the way to it, is refused: its sockets could be swapped."""
    short_path.chmod(0o1777)
    chosen = short_path / "ovm-0" / "default"
    chosen.mkdir(parents=True)
    os.chown((chosen / foreign).resolve(), 65534, 65534)
    options = dataclasses.replace(vm.options, socket_dir=chosen)
    with pytest.raises(UntrustedError, match=words):
        prepare.make_directories(options)


async def test_it_sleeps_and_wakes_with_its_host(running, stage):
    """Paused before the host sleeps, resumed after; both are told."""
    await stage.on_sleep()
    assert running.state is VMState.PAUSED
    await stage.on_wake()
    assert running.state is VMState.RUNNING
    assert running.heard == ["ready", "vmPause", "vmResume"]


async def test_what_its_user_paused_stays_paused(running, stage):
    """The host's sleep is no reason to undo it."""
    await running.vm_pause()
    await stage.on_sleep()
    await stage.on_wake()
    assert running.state is VMState.PAUSED
    assert running.heard == ["ready", "vmPause"]


async def test_a_wake_without_a_sleep_changes_no_state(running, stage):
    """A jump of the clock is told so too."""
    await stage.on_wake()
    assert running.heard == ["ready"]


async def test_a_pause_that_outlasts_the_sleeps_limit_is_undone(running, stage):
    """Who waited gives up and the host sleeps; the pause comes to its end, and the wake takes it back."""
    stage.may_pause.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await stage.on_sleep()
    stage.may_pause.set()
    await stage.on_wake()
    assert running.state is VMState.RUNNING
    assert running.heard == ["ready", "vmPause", "vmResume"]


async def test_a_sleep_in_the_midst_of_a_resume_pauses_again(running, stage):
    """Lid open, lid closed: the second sleep waits for the resume of the first and pauses."""
    await stage.on_sleep()
    stage.may_pause.clear()
    waking = asyncio.create_task(stage.on_wake())
    while running.state is not VMState.RESUMING:
        await asyncio.sleep(0)
    waking.cancel()
    sleeping = asyncio.create_task(stage.on_sleep())
    await asyncio.sleep(0)
    stage.may_pause.set()
    await sleeping
    assert running.state is VMState.PAUSED
    await stage.on_wake()
    assert running.state is VMState.RUNNING


async def test_a_pause_that_has_to_wait_is_undone_too(running, stage):
    """It waits for a change that hangs; the host sleeps, wakes, and only then does the change let go."""
    stage.may_pause.clear()
    changing = asyncio.create_task(running.vm_pause())
    await stage.pausing.wait()
    changing_back = asyncio.create_task(running.vm_resume())
    stage.may_pause.set()
    await asyncio.gather(changing, changing_back)
    await running._pause._turn.acquire()  # as somebody's clocksync would
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await stage.on_sleep()
    waking = asyncio.create_task(stage.on_wake())
    await asyncio.sleep(0)
    running._pause._turn.release()
    await waking
    assert running.state is VMState.RUNNING


async def test_what_its_user_pauses_between_sleep_and_wake_stays_paused(running, stage):
    """A dark wake lets programs run; what was asked then is what is wanted."""
    await stage.on_sleep()
    await running.vm_resume()
    await running.vm_pause()
    await stage.on_wake()
    assert running.state is VMState.PAUSED


async def test_sleep_of_a_machine_that_is_not_up_does_nothing(vm, stage):
    """While it starts there is nothing to pause."""
    starting = asyncio.create_task(vm.start())
    await stage.booting.wait()
    await stage.on_sleep()
    await stage.on_wake()
    stage.ready.set()
    await starting
    assert vm.heard == ["ready"]


async def test_the_hosts_sleep_can_be_left_alone(stage, options):
    """pause_on_sleep=False asks nobody."""
    stage.ready.set()
    async with stage.machine(dataclasses.replace(options, pause_on_sleep=False)):
        assert not hasattr(stage, "on_sleep")
