"""``ovm start --foreground``: a machine that lives as long as the command, and ends as it is asked to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

import ovm
from ovm import cli
from ovm.errors import HelperExited, OptionError
from ovm.info import Health, Info, Stage
from ovm.state import VMState

INFO = Info(
    podman_socket=Path("/run/x/podman.sock"),
    podman_port=None,
    ssh_port=2223,
    ssh_key=Path("/keys/ovm"),
    ssh_user="root",
    hypervisor="qemu",
    accelerator="tcg",
    accelerator_reason="asked for",
    cpus=1,
    memory_mib=256,
    data_disk=Path("/target/data.img"),
    log_dir=Path("/log"),
    timings=(Stage("network", 20.0), Stage("ready", 1500.0)),
    health=Health(),
)


@dataclass
class FakeMachine:
    """Starts and stops as told, and remembers what was asked of it."""

    when_ready: Callable[[FakeMachine], object] = lambda machine: None
    start_takes_s: float = 0.0
    stop_takes_s: float = 0.0
    calls: list[str] = field(default_factory=list)
    listeners: dict[str, Callable[..., object]] = field(default_factory=dict)
    forced: asyncio.Event = field(default_factory=asyncio.Event)
    info = INFO
    state = VMState.RUNNING

    def on(self, name: str, listener: Callable[..., object]) -> None:
        self.listeners[name] = listener
        if name == "close":
            self.when_ready(self)

    def close(self, then: VMState = VMState.STOPPED) -> None:
        self.state = then
        self.listeners["close"]()

    async def start(self) -> None:
        self.calls.append("start")
        if self.start_takes_s:
            self.when_ready(self)
        try:
            await asyncio.sleep(self.start_takes_s)
        except asyncio.CancelledError:
            self.calls.append("start cancelled")
            raise

    async def stop(self, *, force: bool = False, progress: Callable[[str], object] = lambda _: None) -> None:
        progress("asking")
        self.calls.append("stop by force" if force else "stop")
        if force:
            self.forced.set()
        elif self.stop_takes_s:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.wait_for(self.forced.wait(), self.stop_takes_s)


def start(monkeypatch: pytest.MonkeyPatch, machine: FakeMachine, *args: str) -> int:
    """The status of ``ovm start --foreground ARGS`` with this machine."""

    async def create(*_args: object, **_kwargs: object) -> FakeMachine:
        return machine

    monkeypatch.setitem(vars(ovm), "create_ovm", create)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--progress", "plain", "start", "--foreground", "--image", "/image", *args])
    return int(ended.value.code or 0)


def interrupt(_machine: FakeMachine) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate(_machine: FakeMachine) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("ask", [interrupt, terminate])
def test_signal_stops_the_guest_properly(capsys, monkeypatch, ask):
    """Ctrl-C and SIGTERM shut the guest down; stdout holds the lines to paste and nothing else."""
    machine = FakeMachine(when_ready=ask)
    assert start(monkeypatch, machine) == 0
    assert machine.calls == ["start", "stop"]
    said = capsys.readouterr()
    variables = ("DOCKER_HOST", "CONTAINER_HOST")
    assert [line.strip() for line in said.out.splitlines()] == [
        f"export {v}=unix:///run/x/podman.sock" for v in variables
    ]
    assert "ready after 1.5 s (tcg: asked for)" in said.err
    assert "stopping default" in said.err


def test_second_signal_forces(monkeypatch):
    """A second Ctrl-C, while the guest shuts down, cuts its power."""
    monkeypatch.setattr("ovm.cli.start.SAME_SIGNAL_S", 0)
    machine = FakeMachine(when_ready=interrupt, stop_takes_s=5)
    assert start(monkeypatch, machine) == 0
    assert machine.calls == ["start", "stop", "stop by force"]


def test_signal_delivered_twice_is_one(monkeypatch):
    """A wrapper that passes on what the terminal has sent already does not cut the guest's power."""
    machine = FakeMachine(when_ready=lambda it: (interrupt(it), interrupt(it)))
    assert start(monkeypatch, machine) == 0
    assert machine.calls == ["start", "stop"]


@pytest.mark.parametrize(("ask", "status"), [(interrupt, 130), (terminate, 143)])
def test_signal_during_the_boot_cancels_it(monkeypatch, ask, status):
    """A signal before the machine is ready cancels the start, and the status tells."""
    machine = FakeMachine(when_ready=ask, start_takes_s=5)
    assert start(monkeypatch, machine) == status
    assert machine.calls == ["start", "start cancelled"]


def test_info_as_json(capsys, monkeypatch):
    """With --json stdout is one line: where the machine can be reached."""
    assert start(monkeypatch, FakeMachine(when_ready=interrupt), "--json", "box") == 0
    (line,) = capsys.readouterr().out.splitlines()
    info = json.loads(line)
    assert info["name"] == "box"
    assert info["docker_host"] == "unix:///run/x/podman.sock"
    assert info["ssh_port"] == 2223
    assert info["timings"][-1] == {"name": "ready", "ms": 1500.0}


def test_guest_that_powers_itself_off_ends_the_command(capsys, monkeypatch):
    """A guest that powers itself off is a good end."""
    machine = FakeMachine(when_ready=FakeMachine.close)
    assert start(monkeypatch, machine) == 0
    assert "has powered itself off" in capsys.readouterr().err


def test_machine_that_fails_is_an_error(capsys, monkeypatch):
    """When a helper dies the command ends with what the machine says of it."""

    def fail(machine: FakeMachine) -> None:
        machine.listeners["error"](HelperExited("qemu ended", exit_reason="killed by SIGKILL"))
        machine.close()

    assert start(monkeypatch, FakeMachine(when_ready=fail)) == 1
    assert "killed by SIGKILL" in capsys.readouterr().err


def test_machine_that_starts_again_by_itself_keeps_the_command(capsys, monkeypatch):
    """One whose network was lost closes and comes back; what went wrong before its ready is over."""

    def lose_network(machine: FakeMachine) -> None:
        machine.listeners["error"](HelperExited("gvproxy ended"))
        machine.close(then=VMState.STARTING)
        machine.listeners["health"](Health(problems=("the network is lost",)))
        asyncio.get_running_loop().call_later(0.05, come_back, machine)

    def come_back(machine: FakeMachine) -> None:
        machine.listeners["ready"]()
        machine.listeners["health"](Health())
        machine.close()

    assert start(monkeypatch, FakeMachine(when_ready=lose_network)) == 0
    said = capsys.readouterr().err
    assert "default: the network is lost\n" in said
    assert "default: all is well again\n" in said
    assert "has powered itself off" in said


def test_zero_is_refused_and_not_taken_for_the_default(capsys, monkeypatch):
    """``--memory 0`` reaches the machine's own check instead of being dropped."""
    asked = {}

    async def create(name, **options):
        asked.update(options)
        raise OptionError("memory_mib=0 is too little")

    monkeypatch.setitem(vars(ovm), "create_ovm", create)
    with pytest.raises(SystemExit) as ended:
        cli.main(["start", "--foreground", "--image", "/image", "--memory", "0"])
    assert ended.value.code == 1
    assert asked["memory_mib"] == 0
    assert "too little" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "released", "how"),
    [("linux", False, "build"), ("linux", True, "pull"), ("darwin", True, "pull"), ("darwin", False, "pull")],
)
def test_first_start_comes_by_an_image(monkeypatch, tmp_path, platform, released, how):
    """A released one is fetched; else it is built where that can be done, and elsewhere the pull says what to do."""
    done: list[str] = []

    def way(name: str) -> Callable[..., Awaitable[None]]:
        async def go(*_options: object, progress: object) -> None:
            done.append(name)
            raise OptionError("far enough")

        return go

    monkeypatch.setenv("OVM_HOME", str(tmp_path))
    monkeypatch.setattr("ovm.cli.start.sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr("ovm.registry.is_released", lambda _arch: released)
    monkeypatch.setattr("ovm.image.build_image", way("build"))
    monkeypatch.setattr("ovm.image.pull_image", way("pull"))
    with pytest.raises(SystemExit):
        cli.main(["--progress", "plain", "start", "--foreground"])
    assert done == [how]
