"""QEMU over QMP: what it tells, and what is asked of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from qemu.qmp import Message

import vmspecs
from ovm.errors import GuestError, HelperExited, StartError
from ovm.hypervisors import Happening, qemu
from ovm.hypervisors.accel import Emulator
from ovm.hypervisors.qemu_events import translate
from ovm.model.states import VMState

FAKE = """
import json, os, re, sys
argv = " ".join(sys.argv)
fd = int(re.search(r"id=qmp,fd=(\\d+)", argv)[1])
qmp = os.fdopen(fd, "r+b", buffering=0)
say = lambda **words: qmp.write(json.dumps(words).encode() + b"\\r\\n")
say(QMP={"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]})
status = "running"
def requests():  # one after the other, with no line ends between them
    heard = ""
    while chunk := qmp.read(65536):
        heard += chunk.decode()
        while heard:
            try:
                asked, end = json.JSONDecoder().raw_decode(heard)
            except ValueError:
                break
            heard = heard[end:].lstrip()
            yield asked

for asked in requests():
    name, answer, events = asked["execute"], {}, []
    mark = {"id": asked["id"]} if "id" in asked else {}
    if name == "query-status":
        answer = {"status": status, "running": status == "running", "singlestep": False}
    elif name in ("stop", "cont"):
        before, status = status, "paused" if name == "stop" else "running"
        events = [{"stop": "STOP", "cont": "RESUME"}[name]] if status != before else []
    elif name == "system_powerdown":
        print("power button", flush=True)
        events = ["POWERDOWN"]
    elif name == "x-become":
        status = asked["arguments"]["status"]
        for event in asked["arguments"].get("events", ()):
            say(**event, timestamp={"seconds": 1, "microseconds": 2})
    elif name in ("netdev_add", "netdev_del"):
        print(name, json.dumps(asked["arguments"]), flush=True)
    elif name == "x-die":
        os._exit(9)
    elif name not in ("qmp_capabilities", "quit"):
        say(error={"class": "CommandNotFound", "desc": f"The command {name} has not been found"}, **mark)
        continue
    for event in events:
        say(event=event, timestamp={"seconds": 1, "microseconds": 2})
    say(**{"return": answer}, **mark)
    if name == "quit":
        say(event="SHUTDOWN", data={"guest": False, "reason": "host-qmp-quit"},
            timestamp={"seconds": 1, "microseconds": 2})
        sys.exit(0)
"""


@pytest.mark.parametrize(
    ("event", "data", "happening"),
    [
        ("STOP", None, (Happening.PAUSED, "")),
        ("RESUME", None, (Happening.RESUMED, "")),
        ("RESET", {"guest": True, "reason": "guest-reset"}, (Happening.REBOOTED, "guest-reset")),
        ("RESET", {"guest": False, "reason": "host-qmp-system-reset"}, None),
        ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, (Happening.POWERED_OFF, "guest-shutdown")),
        ("SHUTDOWN", {"guest": False, "reason": "host-signal"}, None),
        ("BLOCK_IO_ERROR", {"action": "report", "node-name": "ovm-data"}, None),
        ("POWERDOWN", None, None),
        ("RTC_CHANGE", {"offset": 1}, None),
        ("NEVER_HEARD_OF", None, None),
    ],
)
def test_events_are_told_in_our_words(event, data, happening):
    """Each event of QEMU that matters becomes ours; those that do not become none."""
    assert translate(Message({"event": event} | ({"data": data} if data is not None else {}))) == happening


@pytest.fixture
def program(tmp_path):
    """A maker of programs that QEMU's place is taken by."""

    def make(script: str, *, python: bool = False) -> Emulator:
        path = tmp_path / "qemu"
        if python:
            (tmp_path / "qemu.py").write_text(script)
            script = f'exec {sys.executable} -I -S {tmp_path}/qemu.py "$@"'
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return Emulator(program=path, version=(7, 2), arch="x86_64")

    return make


@pytest.fixture
def start(group, tmp_path):
    """Starts an emulator in QEMU's place; what is told goes to ``told``."""

    def starting(emulator, told=None):
        log = tmp_path / "qemu.log"
        log.touch()
        watcher = (lambda *happening: None) if told is None else lambda *happening: told.put_nowait(happening)
        return qemu.start(group, vmspecs.SMALLEST, emulator, "tcg", log_path=log, watcher=watcher)

    return starting


async def test_pause_and_resume(program, start):
    """Pausing and resuming change the state, are told once, and are fine when repeated."""
    told = asyncio.Queue()
    async with asyncio.timeout(10), start(program(FAKE, python=True), told) as vm:
        assert await vm.state() is VMState.RUNNING
        await vm.pause()
        await vm.pause()
        assert await vm.state() is VMState.PAUSED
        await vm.resume()
        await vm.resume()
        assert await vm.state() is VMState.RUNNING
        assert [await told.get(), await told.get()] == [(Happening.PAUSED, ""), (Happening.RESUMED, "")]
        assert told.empty()


async def test_every_state_of_qemus_is_one_of_ours(program, start):
    """Each of QEMU's run states has its name among the ten, and an unknown one is an error."""
    expected = {
        "running": VMState.RUNNING,
        "paused": VMState.PAUSED,
        "suspended": VMState.PAUSED,
        "prelaunch": VMState.STARTING,
        "inmigrate": VMState.RESTORING,
        "save-vm": VMState.SAVING,
        "restore-vm": VMState.RESTORING,
        "shutdown": VMState.STOPPED,
        "internal-error": VMState.ERROR,
        "io-error": VMState.ERROR,
        "guest-panicked": VMState.ERROR,
        "never-heard-of": VMState.ERROR,
    }
    async with asyncio.timeout(10), start(program(FAKE, python=True)) as vm:
        for status, state in expected.items():
            await vm._execute("x-become", status=status)
            assert await vm.state() is state


def disk_error(**data: object) -> dict[str, object]:
    return {"event": "BLOCK_IO_ERROR", "data": {"node-name": "ovm-data", "reason": "No space left on device"} | data}


@pytest.mark.parametrize(
    ("status", "events", "happening"),
    [
        (
            "io-error",
            [disk_error(action="stop", nospace=True)],
            (Happening.OUT_OF_SPACE, "the disk ovm-data failed: No space left on device"),
        ),
        (
            "io-error",
            [disk_error(action="stop", nospace=False, reason="Input/output error")],
            (Happening.FAILED, "the disk ovm-data failed: Input/output error"),
        ),
        (
            "io-error",
            [disk_error(action="report")],
            (Happening.DISK_ERROR, "the disk ovm-data failed: No space left on device"),
        ),
        ("io-error", [disk_error(action="ignore")], (Happening.FAILED, "QEMU stopped the guest: io-error")),
        ("internal-error", [], (Happening.FAILED, "QEMU stopped the guest: internal-error")),
        ("internal-error", [disk_error(action="stop")], (Happening.FAILED, "QEMU stopped the guest: internal-error")),
        ("paused", [], (Happening.PAUSED, "")),
    ],
)
async def test_why_it_stands_still(program, start, status, events, happening):
    """A guest that QEMU stops on its own account has failed, and it is said why; one that was paused has not."""
    told = asyncio.Queue()
    async with asyncio.timeout(10), start(program(FAKE, python=True), told) as vm:
        await vm._execute("x-become", status=status, events=[*events, {"event": "STOP"}])
        assert await told.get() == happening
        assert told.empty()


async def test_a_guest_that_stopped_before_we_were_connected_is_told(program, start):
    """QEMU sends no event of it: a guest that failed at its first instruction is noticed all the same."""
    told = asyncio.Queue()
    failed = program(FAKE.replace('status = "running"', 'status = "internal-error"', 1), python=True)
    async with asyncio.timeout(10), start(failed, told):
        assert await told.get() == (Happening.FAILED, "QEMU stopped the guest: internal-error")


async def test_the_network_card_gets_another_wire(program, start, tmp_path):
    """The old one is taken off the hub first, and the new one leads to the socket."""
    async with asyncio.timeout(10), start(program(FAKE, python=True)) as vm:
        await vm.replug(Path("/somewhere/net, odd.sock"))
    told = [line.split(" ", 1) for line in (tmp_path / "qemu.log").read_text().splitlines() if "netdev" in line]
    address = {"type": "unix", "path": "/somewhere/net, odd.sock"}
    assert [(name, json.loads(given)) for name, given in told] == [
        ("netdev_del", {"id": "plug"}),
        ("netdev_del", {"id": "wire"}),
        ("netdev_add", {"type": "stream", "id": "wire", "server": False, "addr": address}),
        ("netdev_add", {"type": "hubport", "id": "plug", "hubid": 0, "netdev": "wire"}),
    ]


async def test_the_power_button_is_heard_by_a_paused_guest(program, start, tmp_path):
    """Pressing the power button of a paused machine resumes it first."""
    async with asyncio.timeout(10), start(program(FAKE, python=True)) as vm:
        await vm.pause()
        await vm.request_stop()
        assert await vm.state() is VMState.RUNNING
    assert "power button" in (tmp_path / "qemu.log").read_text()


async def test_the_power_can_be_cut(program, start):
    """Cutting the power ends QEMU, and its end is expected."""
    async with asyncio.timeout(10), start(program(FAKE, python=True)) as vm:
        await vm.force_stop()
        assert await vm.child.wait() == "exit status 0"
        assert vm.child.expected


async def test_a_refusal_is_a_guest_error(program, start):
    """A command that QEMU refuses is an error with its own words."""
    async with asyncio.timeout(10), start(program(FAKE, python=True)) as vm:
        with pytest.raises(GuestError, match=r"QEMU refused x-nothing: .*has not been found"):
            await vm._execute("x-nothing")
        assert await vm.state() is VMState.RUNNING


async def test_a_qemu_that_dies_meanwhile_is_a_guest_error(program, start):
    """A command whose QEMU dies over it is an error, and so is every later one."""
    async with asyncio.timeout(10), start(program(FAKE, python=True)) as vm:
        for command in ("x-die", "query-status"):
            with pytest.raises(GuestError, match=f"QEMU did not answer {command}"):
                await vm._execute(command)


async def test_it_ends_with_its_block(program, start):
    """Left, whatever it was doing, QEMU is gone."""
    async with asyncio.timeout(10):
        with contextlib.suppress(ZeroDivisionError):
            async with start(program(FAKE, python=True)) as vm:
                _ = 1 / 0
    assert not vm.child.running


@pytest.mark.parametrize("status", [0, 1])
async def test_a_qemu_that_ends_at_once_is_told_with_its_words(program, start, status):
    """A QEMU that does not come up is HelperExited with its status and the tail of its log."""
    async with asyncio.timeout(10):
        with pytest.raises(HelperExited) as caught:
            async with start(program(f"echo 'qemu: no such machine' >&2; exit {status}")):
                pass
    assert (caught.value.stage, caught.value.exit_reason) == ("hypervisor", f"exit status {status}")
    assert caught.value.log_tail == ("qemu: no such machine",)


async def test_a_qemu_that_speaks_something_else_is_told(program, start, monkeypatch):
    """What answers on the control socket but does not speak QMP is a start error, not a wait."""
    monkeypatch.setattr(qemu, "END_GRACE_S", 0.05)
    script = FAKE.partition("say(QMP")[0] + 'qmp.write(b"hello\\r\\n"); import time; time.sleep(60)'
    async with asyncio.timeout(10):
        with pytest.raises(StartError, match="control socket failed"):
            async with start(program(script, python=True)):
                pass


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no qemu-system-x86_64 on this machine")
async def test_the_real_qemu(program, start):
    """The real QEMU, without a machine to run, answers, pauses, resumes and ends as the fake one does."""
    script = (
        'while [ "$2" != "chardev=qmp,mode=control" ]; do case $2 in socket,id=qmp,*) chardev=$2;; esac; shift; done\n'
        "exec qemu-system-x86_64 -nodefaults -no-user-config -display none -machine none"
        ' -chardev "$chardev" -mon chardev=qmp,mode=control'
    )
    told = asyncio.Queue()
    async with asyncio.timeout(10), start(program(script), told) as vm:
        assert await vm.state() is VMState.RUNNING
        await vm.pause()
        assert await vm.state() is VMState.PAUSED
        await vm.request_stop()
        assert await vm.state() is VMState.RUNNING
        assert [await told.get(), await told.get()] == [(Happening.PAUSED, ""), (Happening.RESUMED, "")]
        await vm.force_stop()
        assert await vm.child.wait() == "exit status 0"
