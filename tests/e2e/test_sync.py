"""Machines for people without asyncio, on the tiny guest."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import homes
import ovm
import ovm.sync
import tiny
import under
from ovm.sync.loop import Loop

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(sys.platform != "linux", reason="the tiny image is one for QEMU"),
]

SCRIPT_DEADLINE_S = 300


@pytest.fixture(scope="module", autouse=True)
def loop() -> Loop:
    """There before a test counts what it leaves."""
    return Loop.current()


@pytest.fixture
def options(loop: Loop, machines: tiny.Machines) -> Any:
    """Makes the options of a machine."""
    return machines.options


def console(machine: ovm.sync.OVM) -> str:
    return (machine.options.log_dir / "console.log").read_text(errors="replace")


@under.QEMU_ALONE
def test_a_machines_life(options: Any) -> None:
    """Everything, in the words of the API, from a thread without a loop; a listener may use the machine."""
    machine = ovm.sync.create_linux_ovm(options())
    heard: queue.Queue[Any] = queue.Queue()
    remove = machine.on("vmPause", lambda: heard.put("removed"))
    machine.on("ready", lambda: heard.put(machine.info.hypervisor))
    events, stages = machine.events(), list[str]()
    machine.start(progress=stages.append)
    assert stages[-1] == "ready"
    assert machine.state is ovm.VMState.RUNNING
    assert heard.get(timeout=30) == "qemu"
    remove()
    machine.vm_pause()
    assert machine.vm_state().can_resume
    machine.vm_resume()
    forward = machine.export_port(0, 22)
    assert machine.ports() == (forward,)
    machine.unexport_port(forward.host_port)
    with pytest.raises(ovm.PortError, match="not exported"):
        machine.unexport_port(forward.host_port)
    assert machine.check_health().ok
    with pytest.raises(ovm.UnsupportedError), machine.process(["true"]):
        pass
    machine.stop()
    assert [next(events).name for _ in range(4)] == ["ready", "vmPause", "vmResume", "close"]
    assert "the power button was pressed" in console(machine)
    with machine:
        assert machine.info.hypervisor == "qemu"
        closed = threading.Thread(target=machine.wait_closed)
        closed.start()
    closed.join(timeout=60)
    assert (closed.is_alive(), machine.state) == (False, ovm.VMState.STOPPED)
    assert {state.name for state in machine.verify()} >= {"kernel", "initrd"}
    assert heard.get(timeout=30) == "qemu"
    assert heard.empty()


@under.QEMU_ALONE
def test_ctrl_c_in_a_start_leaves_nothing(options: Any) -> None:
    """Ctrl-C during a blocking start leaves nothing running."""
    machine = ovm.sync.create_linux_ovm(options("m", "never"))

    def interrupt(stage: str) -> None:
        if stage == "hypervisor":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        machine.start(progress=interrupt)
    assert machine.state is ovm.VMState.STOPPED


@under.QEMU_ALONE
def test_a_start_that_fails_says_why(options: Any) -> None:
    """A blocking start that fails raises the cause."""
    machine = ovm.sync.create_linux_ovm(options("m", "fatal=data-unformatted"))
    with pytest.raises(ovm.StartError, match="tiny cannot go on"), machine:
        pytest.fail("it started")


PROGRAM = """
import json, sys, threading
import ovm.sync

machine = ovm.sync.create_linux_ovm(json.loads(sys.argv[1]))
machine.on("close", lambda: print("closed", flush=True))
machine.start()
print(machine.state, flush=True)
"""


@under.QEMU_ALONE
@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 3), ("machine.vm_pause()\nraise ValueError('mine')", 1)])
def test_an_interpreter_that_exits_shuts_the_guest_down(options: Any, end: str, status: int) -> None:
    """An interpreter that exits shuts the guest down."""
    told = options()
    argv = [sys.executable, "-W", "error", "-c", PROGRAM + end, json.dumps(told)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=SCRIPT_DEADLINE_S)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines()[1:] == ["closed"]
    assert done.stderr == "" or done.stderr.endswith("ValueError: mine\n")
    assert "the power button was pressed" in (Path(told["log_dir"]) / "console.log").read_text(errors="replace")


@pytest.fixture
def home(tiny_guest: tiny.Guest, gvproxy: Path, short_path: Path) -> Iterator[homes.Home]:
    made = homes.Home(short_path, tiny_guest, gvproxy)
    yield made
    made.end()


async def test_a_service_is_driven(home: homes.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process has started; and a loop that is blocked meanwhile is no obstacle."""
    home.init()
    await home.good("start")
    for name, value in home.environment.items():
        monkeypatch.setenv(name, value)
    with ovm.sync.connect() as machine:
        events = machine.events()
        paused: queue.Queue[str] = queue.Queue()
        machine.on("vmPause", lambda: paused.put(machine.vm_state().state))
        assert (machine.name, machine.service_version) == ("default", ovm.__version__)
        machine.vm_pause()
        assert next(events).name == "vmPause"
        assert paused.get(timeout=30) == ovm.VMState.PAUSED
        machine.vm_resume()
        assert machine.status().state is ovm.VMState.RUNNING
        assert machine.info().hypervisor == "qemu"
        assert [told.name for told in machine.history() if told.name != "step"][:2] == ["ready", "vmPause"]
        machine.stop(force=True)
        with pytest.raises(ovm.StateError, match="is not running"):
            machine.vm_state()
    await home.nothing_left()
