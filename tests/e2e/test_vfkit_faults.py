"""Everything the double of vfkit can be ordered to do wrong, in each phase of a machine's life (docs/errors.md)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import ovm
import processes
import tiny
import under
from ovm.model.defaults import STOP_TIMEOUT_S

pytestmark = [pytest.mark.tiny, under.VFKIT_ALONE]

HASTE = {
    "ovm.machine.shutdown.FORCE_TIMEOUT_S": 0.5,
    "ovm.hypervisors.vfkit.ANSWER_TIMEOUT_S": 1.0,
    "ovm.hypervisors.vfkit.END_GRACE_S": 0.5,
}
"""For what would be waited out."""

DEAF = {"ignore_stop": True, "ignore_hardstop": True, "ignore_sigterm": True}

AFTER = {
    "start": "Running", "start!": "Stopped", "cancel": "Stopped", "halt": "Stopped",
    "pause": "Paused", "pause!": "Running", "resume": "Running", "resume!": "Paused",
    "sleep!": "Running", "wake": "Running", "stop": "Stopped", "force": "Stopped", "close": "Stopped",
}  # fmt: skip
"""The state after each step; ``!`` is a call that fails."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A fault, the steps of a life with it, and how that life goes."""

    faults: Mapping[str, Any] = field(default_factory=dict)
    """Ordered of the double (tests/doubles/vfkit/faults.go)."""
    steps: str
    """Those of :class:`Life`. One that ends in ``!`` fails and leaves a machine that can be used, one that ends in
    ``?`` fails in a machine that is ending."""
    events: str
    word: str = ""
    """Ordered of the guest."""
    refusal: str = ""
    """What a call that failed said."""
    error: type[ovm.OVMError] = ovm.HelperExited
    stage: str = ""
    """Where that error came from; with a choice, if it depends on who is faster."""
    reason: str = ""
    """How vfkit ended, in that error."""
    tail: str = ""
    """In vfkit's last words, which that error shows."""
    log: str = ""
    """In the manager's log."""
    pressed: bool | None = None
    """Whether the guest saw its power button pressed."""
    haste: Mapping[str, float] = field(default_factory=dict)
    """Deadlines made short."""


def died(reason: str, **more: Any) -> dict[str, Any]:
    """In a start."""
    return {"steps": "start!", "events": "error close", "reason": reason} | more


AGAIN = {"steps": "start! heal start force", "events": "error close ready close"}
"""And the next start of the same object succeeds."""


def crashed(reason: str, **more: Any) -> dict[str, Any]:
    """Of a machine that was running."""
    return {"stage": "running", "reason": reason} | more


ROWS = {
    # -- starting
    "dies over its arguments": Row(
        faults={"die_at": "arguments", "die_with": 3}, **died("exit status 3", stage="hypervisor", **AGAIN)
    ),
    "crashes over its arguments": Row(
        faults={"die_at": "arguments", "die_with": "SIGSEGV"}, **died("killed by SIGSEGV", stage="hypervisor")
    ),
    "dies over its network": Row(
        faults={"die_at": "network", "leave_net_socket": True}, **died("exit status 1", stage="hypervisor")
    ),
    "dies when REST is there": Row(
        faults={"die_at": "rest", "die_with": "SIGKILL"}, **died("killed by SIGKILL", stage="hypervisor|boot")
    ),
    "dies when the machine starts": Row(
        faults={"die_at": "starting", "die_with": "SIGKILL"}, **died("killed by SIGKILL", stage="hypervisor|boot")
    ),
    "dies when the machine runs": Row(
        faults={"die_at": "running", "die_with": "SIGSEGV"},
        **died("killed by SIGSEGV", stage="hypervisor|boot", **AGAIN),
    ),
    "leaves without a word when the machine runs": Row(
        faults={"die_at": "vsock", "die_with": 0}, **died("exit status 0", stage="hypervisor|boot")
    ),
    "is slower to start than it waits": Row(
        faults={"slow_starting_s": 60}, **died("exit status 1", stage="boot", tail="timeout waiting for VM state")
    ),
    "the framework fails during the boot": Row(
        faults={"error_after_s": 0.05}, **died("exit status 1", stage="boot", tail="virtualization error")
    ),
    "is told to end during the boot": Row(
        word="never", steps="boot term fail", events="error close", reason="exit status 0", stage="boot",
        tail="captured terminated",
    ),
    "REST hangs from the start": Row(
        faults={"hang_rest": True}, **died("", error=ovm.NotReadyError, stage="hypervisor", **AGAIN),
        haste=HASTE | {"ovm.hypervisors.vfkit.REST_START_S": 1.0},
    ),
    "REST hangs from the start and SIGTERM does nothing": Row(
        faults={"hang_rest": True, "ignore_sigterm": True}, **died("", error=ovm.NotReadyError, stage="hypervisor"),
        haste=HASTE | {"ovm.hypervisors.vfkit.REST_START_S": 1.0}, log="vfkit ignored SIGTERM",
    ),
    "a cancelled start and nothing but SIGKILL helps": Row(
        faults={"ignore_hardstop": True, "ignore_sigterm": True}, steps="cancel halt heal start force",
        events="close close ready close", log="vfkit ignored SIGTERM", haste=HASTE,
    ),
    "a cancelled start and no answer to the hard stop": Row(
        faults={"lose_hardstop_answer": True}, steps="cancel halt", events="close close"
    ),
    "a cancelled start and death over the hard stop": Row(
        faults={"die_at": "hardstop", "die_with": "SIGSEGV"}, steps="cancel halt", events="close close"
    ),
    # -- pausing and resuming
    "dies over a pause": Row(
        faults={"die_at": "pause", "die_with": "SIGSEGV"}, steps="start pause? close heal start force",
        events="ready error close ready close", **crashed("killed by SIGSEGV"),
    ),
    "dies over a resume": Row(
        faults={"die_at": "resume", "die_with": 2}, steps="start pause resume? close",
        events="ready vmPause error close", **crashed("exit status 2"),
    ),
    "a pause is refused": Row(
        faults={"refuse": {"Pause": "The machine is too busy."}}, steps="start pause! resume stop",
        events="ready close", refusal="vfkit did not pause the machine: .*too busy", pressed=True,
    ),
    "a resume is refused": Row(
        faults={"refuse": {"Resume": "Not now."}}, steps="start pause resume! pause stop",
        events="ready vmPause close", refusal="vfkit did not resume the machine: .*Not now", pressed=False, haste=HASTE,
    ),
    "a pause takes its time": Row(
        faults={"slow_pause_s": 1}, steps="start pause resume pause force",
        events="ready vmPause vmResume vmPause close",
    ),
    "a pause is given up, comes about, and is resumed": Row(
        faults={"slow_pause_s": 1}, steps="start pause! seen patience resume stop",
        events="ready vmPause vmResume close", refusal="no response within 0.3 s", pressed=True,
        haste={"ovm.hypervisors.vfkit.PAUSE_TIMEOUT_S": 0.3},
    ),
    "a pause is given up, comes about, and is asked for again": Row(
        faults={"slow_pause_s": 1}, steps="start pause! patience pause stop", events="ready vmPause close",
        refusal="no response within 0.3 s", pressed=True, haste={"ovm.hypervisors.vfkit.PAUSE_TIMEOUT_S": 0.3},
    ),
    "a pause is given up, comes about, and the machine is stopped": Row(
        faults={"slow_pause_s": 1}, steps="start pause! patience stop", events="ready close",
        refusal="no response within 0.3 s", pressed=True, haste={"ovm.hypervisors.vfkit.PAUSE_TIMEOUT_S": 0.3},
    ),
    "the host's sleep does not wait for its pause": Row(
        faults={"slow_pause_s": 1}, steps="start sleep! patience wake stop", events="ready vmPause vmResume close",
        refusal="no response within 0.3 s", pressed=True, haste={"ovm.hypervisors.vfkit.PAUSE_TIMEOUT_S": 0.3},
    ),
    "no answer ever comes": Row(
        faults={"lose_answer": ["Pause", "Resume", "Stop", "HardStop"]}, steps="start pause resume pause stop",
        events="ready vmPause vmResume vmPause close", pressed=True,
    ),
    "an old version without the can… fields": Row(
        faults={"no_can_fields": True, "slow_starting_s": 1}, steps="start pause resume pause stop",
        events="ready vmPause vmResume vmPause close", pressed=True,
    ),
    "stands still for a while": Row(
        steps="start freeze pause! thaw pause freeze resume! thaw resume stop", events="ready vmPause vmResume close",
        refusal="vfkit did not report its state: GET /vm/state: no response", pressed=True,
        haste={"ovm.hypervisors.vfkit.ANSWER_TIMEOUT_S": 2.0},
    ),
    # -- running and paused
    "the framework fails": Row(
        steps="start fault close heal start force", events="ready error close ready close",
        **crashed("exit status 1", tail="virtualization error"),
    ),
    "the framework fails while paused": Row(
        steps="start pause fault close", events="ready vmPause error close",
        **crashed("exit status 1", tail="virtualization error"),
    ),
    "is killed": Row(steps="start kill close", events="ready error close", **crashed("killed by SIGKILL")),
    "is killed while paused": Row(
        faults={"leave_net_socket": True}, steps="start pause kill close", events="ready vmPause error close",
        **crashed("killed by SIGKILL"),
    ),
    "is told to end": Row(
        steps="start term close", events="ready error close", pressed=True,
        **crashed("exit status 0", tail="captured terminated"),
    ),
    "is told to end while paused": Row(
        steps="start pause term close", events="ready vmPause error close",
        **crashed("exit status 0", tail="captured terminated"),
    ),
    "is told to end and does not": Row(
        faults={"ignore_sigterm": True}, steps="start term pause resume term stop",
        events="ready vmPause vmResume close", pressed=True,
    ),
    "the guest powers itself off": Row(
        faults={"lose_hardstop_answer": True, "ignore_stop": True}, steps="start off close", events="ready close"
    ),
    # -- stopping
    "dies over a stop": Row(
        faults={"die_at": "stop", "die_with": "SIGSEGV"}, steps="start stop heal start force",
        events="ready close ready close", pressed=False,
        log="vfkit ended before the guest had shut down: killed by SIGSEGV",
    ),
    "dies over the resume of a stop": Row(
        faults={"die_at": "resume"}, steps="start pause stop", events="ready vmPause close",
        log="vfkit ended before the guest had shut down: exit status 1",
    ),
    "dies over a hard stop": Row(
        faults={"die_at": "hardstop", "die_with": 4}, steps="start force", events="ready close"
    ),
    "dies over a hard stop while paused": Row(
        faults={"die_at": "hardstop", "die_with": "SIGKILL"}, steps="start pause force", events="ready vmPause close"
    ),
    "the button does nothing": Row(
        faults={"ignore_stop": True}, steps="start stop", events="ready close", pressed=False,
        log="cutting the guest's power", haste=HASTE,
    ),
    "the button is refused": Row(
        faults={"refuse": {"Stop": "No."}}, steps="start stop", events="ready close", pressed=False,
        log="cutting the guest's power", haste=HASTE,
    ),
    "a hard stop does nothing": Row(
        faults={"ignore_hardstop": True}, steps="start force", events="ready close", pressed=True,
        haste=HASTE | {"ovm.hypervisors.vfkit.END_GRACE_S": 30.0},
    ),
    "a hard stop is refused": Row(
        faults={"refuse": {"HardStop": "No."}}, steps="start force", events="ready close", pressed=True,
        haste=HASTE | {"ovm.hypervisors.vfkit.END_GRACE_S": 30.0},
    ),
    "a hard stop is not answered": Row(
        faults={"lose_hardstop_answer": True}, steps="start force start pause force",
        events="ready close ready vmPause close",
    ),
    "nothing but SIGKILL helps": Row(
        faults=DEAF, steps="start stop heal start force",
        events="ready close ready close", pressed=False, log="vfkit ignored SIGTERM", haste=HASTE,
    ),
    "nothing but SIGKILL helps while paused": Row(
        faults=DEAF, steps="start pause stop",
        events="ready vmPause close", pressed=False, log="vfkit ignored SIGTERM", haste=HASTE,
    ),
    "all is refused": Row(
        faults={"refuse": dict.fromkeys(("Resume", "Stop", "HardStop"), "No.")}, steps="start pause stop",
        events="ready vmPause close", pressed=False, log="cutting the guest's power", haste=HASTE,
    ),
    "stands still for ever": Row(
        steps="start freeze stop", events="ready close", pressed=False, log="vfkit ignored SIGTERM", haste=HASTE
    ),
    "stands still for ever while paused": Row(
        steps="start pause freeze force", events="ready vmPause close", log="vfkit ignored SIGTERM", haste=HASTE
    ),
    "leaves its end of the network": Row(
        faults={"leave_net_socket": True}, steps="start stop", events="ready close", pressed=True
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def the_double() -> None:
    """A real vfkit takes no orders."""
    under.doubled()


class Life:
    """The steps of a machine's life."""

    def __init__(
        self, m: tiny.Machine, machines: tiny.Machines, monkeypatch: pytest.MonkeyPatch, *, hasty: bool
    ) -> None:
        self.m, self.machines, self.monkeypatch = m, machines, monkeypatch
        self.stop_timeout_s = 1.0 if hasty else STOP_TIMEOUT_S
        self.starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.m.ovm.start()

    async def boot(self) -> None:
        """A start up to where the guest says its first word."""
        self.starting = self.m.start_soon()
        await self.m.until_step("hypervisor")
        async with asyncio.timeout(60):
            while "waiting for VM to stop" not in self.vfkits_log():
                await asyncio.sleep(0.02)

    async def fail(self) -> None:
        """The end of that start."""
        assert self.starting is not None
        with pytest.raises(ovm.OVMError) as caught:
            await self.starting
        assert self.m.errors == [caught.value]

    async def cancel(self) -> None:
        await self.boot()
        assert self.starting is not None
        self.starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.starting

    async def halt(self) -> None:
        """Stop a start."""
        await self.boot()
        assert self.starting is not None
        await self.m.ovm.stop()
        with pytest.raises(ovm.StartError, match="stopped before it was ready"):
            await self.starting

    async def pause(self) -> None:
        await self.m.ovm.vm_pause()

    async def resume(self) -> None:
        await self.m.ovm.vm_resume()

    async def sleep(self) -> None:
        await self.m.ovm._pause.before_sleep()

    async def wake(self) -> None:
        await self.m.ovm._pause.after_wake()

    async def stop(self) -> None:
        await self.m.ovm.stop(timeout_s=self.stop_timeout_s)

    async def force(self) -> None:
        await self.m.ovm.stop(force=True)

    async def close(self) -> None:
        """Until the machine has ended of its own accord."""
        await self.m.until(event="close", count=self.m.events.count("close") + (self.m.state != "Stopped"))

    async def off(self) -> None:
        await self.m.order("poweroff -f")

    async def term(self) -> None:
        """As a user's `kill` does."""
        said = self.vfkits_log().count("captured terminated")
        os.kill(self.vfkit(), signal.SIGTERM)
        async with asyncio.timeout(60):
            while self.vfkits_log().count("captured terminated") == said:
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        os.kill(self.vfkit(), signal.SIGKILL)

    async def freeze(self) -> None:
        await asyncio.to_thread(processes.freeze, self.vfkit())

    async def thaw(self) -> None:
        os.kill(self.vfkit(), signal.SIGCONT)

    async def fault(self) -> None:
        """Apple's framework fails, that is QEMU."""
        os.kill(self.process("/qemu-system-"), signal.SIGKILL)

    async def seen(self) -> None:
        """Until vfkit, when it is asked, says that a pause has come about."""
        async with asyncio.timeout(60):
            while (await self.m.ovm.vm_state()).state != "VirtualMachineStatePaused":
                assert self.m.state == "Running"
                await asyncio.sleep(0.1)

    async def patience(self) -> None:
        self.monkeypatch.setattr("ovm.hypervisors.vfkit.PAUSE_TIMEOUT_S", 60.0)

    async def heal(self) -> None:
        """Nothing is wrong from now on, and nothing is left of what was."""
        assert await self.machines.leftovers() == []
        self.machines.faults()
        self.monkeypatch.undo()

    def vfkit(self) -> int:
        return self.process("/target/vfkit")

    def process(self, program: str) -> int:
        commands = {pid: processes.command(pid).split(" ")[0] for pid in processes.holders(self.machines.root)}
        (found,) = [pid for pid, command in commands.items() if program in command]
        return found

    def vfkits_log(self) -> str:
        return (self.m.ovm.options.log_dir / "vfkit.log").read_text()


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items()])
async def test_a_fault_ends_as_documented(
    machines: tiny.Machines, row: Row, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the state, with the events and the error of its row, and with nothing left behind."""
    m = await machines("m", row.word)
    machines.faults(**row.faults)
    with monkeypatch.context() as patched:
        for name, value in row.haste.items():
            patched.setattr(name, value)
        life = Life(m, machines, patched, hasty=row.haste == HASTE)
        for step in row.steps.split():
            act = getattr(life, step.rstrip("!?"))
            if step == "start!":
                with pytest.raises(ovm.StartError):
                    await act()
            elif step[-1] in "!?":
                with pytest.raises((ovm.GuestError, ovm.StateError), match=row.refusal if step[-1] == "!" else None):
                    await act()
            else:
                await act()
            if step in AFTER:
                assert m.state == AFTER[step], step
                under_way = step[-1] == "!" and "slow_pause_s" in row.faults
                if m.state in {"Running", "Paused"} and not under_way:
                    assert (await m.ovm.vm_state()).state == f"VirtualMachineState{m.state}", step
    assert " ".join(m.events) == row.events
    assert await machines.leftovers() == []
    if not row.stage:
        assert m.errors == []
    else:
        (error,) = m.errors
        assert type(error) is row.error
        assert re.fullmatch(row.stage, error.stage)
        assert error.exit_reason == row.reason
        assert row.tail in "\n".join(error.log_tail)
    assert row.log in caplog.text
    if row.pressed is not None:
        logs = m.ovm.options.log_dir
        console = logs / ("console.2.log" if "heal" in row.steps else "console.log")
        assert ("the power button was pressed" in console.read_text(errors="replace")) is row.pressed


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("v0.6.1", r"is vfkit 0\.6\.1; 0\.6\.2 or newer is required: on SIGTERM, older versions cut the guest's power"),
        ("v0.5.1-dirty", r"is vfkit 0\.5\.1"),
        ("of another kind", "does not print its version, so it may be another program"),
    ],
)
async def test_a_version_that_will_not_do_is_refused(machines: tiny.Machines, version: str, message: str) -> None:
    """By create, before anything is touched."""
    machines.vfkit = with_faults(machines.root, version=version)
    with pytest.raises(ovm.HelperError, match=message) as caught:
        await machines()
    assert "brew install vfkit" in caught.value.hint
    assert not (machines.root / "m").exists()


async def test_a_version_that_vfkit_itself_does_not_know_is_taken(
    machines: tiny.Machines, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning: it may be one that somebody built."""
    machines.vfkit = with_faults(machines.root, version="unknown", hang_rest=True)
    m = await machines()
    assert "is a build of vfkit without a version number" in caplog.text
    assert "vfkit unknown" in m.ovm._context.prepared.driver.accelerator_reason
    assert await machines.leftovers() == []


def with_faults(root: Path, **faults: Any) -> Path:
    """A double that is told so before it is copied."""
    directory = root / "origin"
    directory.mkdir()
    (directory / "double.json").write_text(json.dumps(faults))
    return Path(shutil.copy(under.vfkit(), directory / "vfkit"))


async def test_a_killed_manager_leaves_sockets_alone_and_the_next_start_clears_them(machines: tiny.Machines) -> None:
    """Neither vfkit nor what it has started outlives the manager; the sockets that nobody removes are in no way."""
    manager = await asyncio.create_subprocess_exec(
        sys.executable,
        Path(__file__).with_name("manager.py"),
        json.dumps(machines.options()),
        stdin=DEVNULL,
        stdout=PIPE,
        process_group=0,
    )
    try:
        assert manager.stdout is not None
        async with asyncio.timeout(120):
            assert [await manager.stdout.readline() for _ in range(2)] == [b"starting\n", b"ready\n"]
        running = " ".join(processes.command(pid).split(" ")[0] for pid in processes.holders(machines.root))
        for program in ("/gvproxy", "/vfkit", "/qemu-system-", "/vhost-device-vsock"):
            assert program in running
    finally:
        with contextlib.suppress(ProcessLookupError):
            manager.kill()
        await manager.communicate()
    async with asyncio.timeout(20):
        while processes.holders(machines.root):
            await asyncio.sleep(0.02)
    sockets = machines.root / "m" / "socket"
    left = {path for path in sockets.iterdir() if path.is_socket()}
    (vfkits_own,) = [path for path in left if re.fullmatch(r"vfkit-[0-9a-f]+-[0-9a-f]+\.sock", path.name)]
    assert {path.name for path in left - {vfkits_own}} >= {"vfkit.sock", "net.sock", "ready.sock", "network.sock"}

    m = await machines()
    async with m.ovm:
        assert m.events == ["ready"]
        assert not vfkits_own.exists()
    assert await machines.leftovers() == []
