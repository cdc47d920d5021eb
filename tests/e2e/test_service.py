"""Machines that outlive the command that started them: the service, its commands, and other programs that drive it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

import homes
import ovm
import tiny
from ovm.service import client
from ovm.service import protocol as p

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(sys.platform != "linux", reason="the tiny image is one for QEMU"),
]

SETTLED_S = 5.0
"""Until a machine that has just become ready was looked at for the first time."""
IDLE_S = 10.0
WAKES_PER_S = 5.0
"""A tick each five seconds wakes a handful of threads; who looks ten times a second is seen."""
GONE_S = 2.0
"""Promised, from the kill of a service on."""


def adopt(home: homes.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process uses that home, too."""
    for name, value in home.environment.items():
        monkeypatch.setenv(name, value)


async def test_a_machine_outlives_its_command(home: homes.Home) -> None:
    """Everything a person does with it in a day, by commands alone."""
    home.init()
    started = await home.good("start")
    assert "export DOCKER_HOST=unix://" in started.out
    assert "ovm stop" in started.err
    status = await home.status()
    assert status["state"] == "VirtualMachineStateRunning"
    assert (status["step"], status["restart_needed"]) == ("", [])
    again = await home.good("start")
    assert again.out == started.out
    assert (await home.status())["pid"] == status["pid"]

    assert (await home.good("pause")).out == "default is paused\n"
    assert (await home.run("status")).status == 3
    assert (await home.good("resume")).out == "default is running\n"
    port = (await home.good("port", "add", "22", "--json")).json
    assert await tiny.tell(port["host_port"], "echo here") == "here\n"
    (row,) = (await home.good("port", "ls", "--json")).json
    assert row == {"protocol": "tcp", "host": f"127.0.0.1:{port['host_port']}", "guest": 22, "purpose": "export"}
    await home.good("port", "rm", str(port["host_port"]))
    assert (await home.good("port", "ls", "--json")).json == []
    events = [json.loads(line) for line in (await home.good("events", "--json")).out.splitlines()]
    assert [told["id"] for told in events] == list(range(1, len(events) + 1))
    assert [told["name"] for told in events if told["name"] != "step"] == ["ready", "vmPause", "vmResume"]
    assert "tiny: booted" in (await home.good("logs")).out

    await home.good("config", "set", "memory", "300M")
    assert (await home.status())["restart_needed"] == ["memory"]
    assert (await home.good("restart", "--json")).json["memory_mib"] == 300
    await home.good("stop")
    assert (await home.good("stop")).err == "default is stopped\n"
    assert (await home.status()) == {"name": "default", "state": "VirtualMachineStateStopped", "why": "stopped"}
    await home.nothing_left()


async def test_a_machine_is_suspended(home: homes.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, and by another program; it is told apart from a stopped one, and goes on where it was."""
    home.init()
    port = (await home.good("start", "--json")).json["ssh_port"]
    await tiny.tell(port, "echo precious >/kept")
    await home.good("suspend")
    await home.nothing_left()
    suspended = "suspended: the next start resumes it"
    assert (await home.status())["why"] == suspended
    assert [row["state"] for row in (await home.good("ls", "--json")).json] == ["suspended"]
    assert (await home.good("suspend")).err == f"default is {suspended}\n"
    assert (await home.good("stop")).err == f"default is {suspended}\n"

    info = (await home.good("start", "--json")).json
    assert info["not_resumed"] == ""
    assert await tiny.tell(info["ssh_port"], "cat /kept") == "precious\n"
    adopt(home, monkeypatch)
    async with await ovm.connect() as machine:
        await machine.suspend()
    await home.nothing_left()
    (memory,) = home.machine("default").rglob("memory.suspended")
    memory.write_bytes(b"damaged")
    started = await home.good("start")
    assert "Could not resume (the saved state is damaged" in started.err

    for again in (("start", "--cold", "--json"), ("restart", "--json")):
        await home.good("suspend")
        info = (await home.good(*again)).json
        assert info["not_resumed"] == "", "nobody wanted it"
        assert await tiny.tell(info["ssh_port"], "cat /kept 2>/dev/null") == ""
    refused = await home.run("start", "--cold")
    assert "default is running" in refused.err
    await home.good("stop")
    assert "default is stopped" in (await home.good("stop")).err
    nowhere = await home.run("suspend")
    assert (nowhere.status, "not running" in nowhere.err) == (1, True)
    await home.nothing_left()


async def test_a_start_makes_what_is_not_there(home: homes.Home) -> None:
    """With the defaults, or with what is given; its settings are there to be read afterwards."""
    await home.good("start")
    assert [row["name"] for row in (await home.good("ls", "--json")).json] == ["default"]
    assert "\n# cpus = " in (home.machine("default") / "machine.toml").read_text()
    await home.good("stop")
    done = await home.good("start", "small", "--cpus", "1", "--memory", "256M", "--disk", "256M")
    assert "machine.toml: cpus, memory, disk" in done.err
    assert (await home.good("config", "get", "--json", "--machine", "small")).json["memory"] == "256M"
    await home.good("stop", "small")
    await home.nothing_left()


async def test_a_service_of_no_machine_says_so(home: homes.Home) -> None:
    """One that a login starts, of a machine that was removed by hand."""
    argv = (sys.executable, "-m", "ovm.service", "nobody")
    process = await asyncio.create_subprocess_exec(*argv, env=home.environment, stderr=asyncio.subprocess.PIPE)
    _, err = await process.communicate()
    assert process.returncode == 1
    assert "there is no machine called nobody" in err.decode()
    assert "Traceback" not in err.decode()


async def test_its_files_are_its_users_alone(home: homes.Home) -> None:
    """Nobody but the user may read the files of a service."""
    home.init()
    await home.good("start")
    (path,) = (home.root / "run").rglob("ovm.sock")
    modes = {path: path.lstat().st_mode, path.parent: path.parent.lstat().st_mode}
    for name in ("service.json", "service.lock", "log/service.log"):
        modes[home.machine("default") / name] = (home.machine("default") / name).lstat().st_mode
    assert {str(path): oct(stat.S_IMODE(mode) & 0o077) for path, mode in modes.items() if mode & 0o077} == {}
    await home.good("stop", "--force")


async def test_it_sleeps_while_nothing_happens(home: homes.Home) -> None:
    """Something that looks, however quick it is, would wake it many times as often as its slow ticks do."""
    home.init()
    await home.good("start")
    pid = (await home.status())["pid"]
    await asyncio.sleep(SETTLED_S)
    before = wakes(pid)
    await asyncio.sleep(IDLE_S)
    assert wakes(pid) - before < IDLE_S * WAKES_PER_S
    await home.good("stop", "--force")


def wakes(pid: int) -> int:
    """How often a thread of the process has waited for something."""
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for status in found)


async def test_two_starts_at_the_same_instant_are_one(home: homes.Home) -> None:
    """Two starts at the same time start one service."""
    home.init()
    starts = await asyncio.gather(*(home.good("start", "--json") for _ in range(3)))
    assert len({start.json["ssh_port"] for start in starts}) == 1
    await home.good("stop", "--force")
    await home.nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_start_leaves_nothing(home: homes.Home, number: signal.Signals) -> None:
    """Ctrl-C in a start leaves nothing running."""
    home.init("default", "never")
    starting = await home.begin("start")
    console = home.machine("default") / "log" / "console.log"
    async with asyncio.timeout(homes.DEADLINE_S):
        while not console.exists() or "tiny: booted" not in console.read_text(errors="replace"):
            await asyncio.sleep(0.05)
    starting.send_signal(number)
    _, err = await starting.communicate()
    assert starting.returncode == 128 + number
    assert b"Traceback" not in err
    assert b"nothing that this command started is left running" in err
    await home.nothing_left()


async def test_a_start_that_fails_says_why_now_and_later(home: homes.Home) -> None:
    """A start that fails reports the cause, and so does the status afterwards."""
    home.init("default", "fatal=data-unformatted")
    failed = await home.run("start")
    assert failed.status == 1
    assert "tiny cannot go on" in failed.err
    assert "hint:" in failed.err
    await home.nothing_left()
    status = await home.status()
    assert status["state"] == "VirtualMachineStateStopped"
    assert "failed" in status["why"]
    (row,) = (await home.good("ls", "--json")).json
    assert (row["state"], "tiny cannot go on" in row["why"]) == ("stopped", True)


async def test_a_killed_service_takes_its_machine_with_it(home: homes.Home) -> None:
    """And is told of: a machine is never said to run that does not."""
    home.init()
    await home.good("start")
    pid = (await home.status())["pid"]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    while home.left() and time.monotonic() < killed + 10 * GONE_S:
        await asyncio.sleep(0.02)
    assert home.left() == []
    (row,) = (await home.good("ls", "--json")).json
    assert (row["state"], row["why"]) == ("crashed", f"its service (process {pid}) was killed")
    assert "crashed" in (await home.run("status")).out
    await home.good("start")
    assert (await home.good("ls", "--json")).json[0]["state"] == "running"
    await home.good("stop", "--force")


async def test_a_guest_that_powers_itself_off(home: homes.Home) -> None:
    """A guest that powers itself off ends its service without an error."""
    home.init()
    port = (await home.good("start", "--json")).json["ssh_port"]
    await tiny.order(port, "poweroff -f")
    async with asyncio.timeout(homes.DEADLINE_S):
        while home.left():
            await asyncio.sleep(0.1)
    assert (await home.status())["why"] == "stopped: it powered itself off"


async def test_another_program_drives_it(home: homes.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ovm.connect``: the words of the library for a machine that it did not start."""
    home.init()
    await home.good("start")
    adopt(home, monkeypatch)
    async with await ovm.connect() as machine:
        heard: list[str] = []
        for name in ("vmPause", "vmResume", "close"):
            machine.on(name, lambda name=name: heard.append(name))
        events = machine.events()
        assert (await machine.info()).hypervisor == "qemu"
        assert (await machine.vm_state()).can_pause
        await machine.vm_pause()
        assert (await machine.vm_state()).state is ovm.VMState.PAUSED
        await machine.vm_resume()
        forward = await machine.export_port(0, 22)
        assert (await machine.ports()) == (forward,)
        await machine.unexport_port(forward.host_port)
        with pytest.raises(ovm.PortError, match="not exported"):
            await machine.unexport_port(forward.host_port)
        with pytest.raises(ovm.UnsupportedError):
            await machine.exec(["true"])
        assert (await machine.check_health()).ok
        await machine.stop(force=True)
        async with asyncio.timeout(30):
            assert [(await anext(events)).name for _ in range(3)] == ["vmPause", "vmResume", "close"]
        assert heard == ["vmPause", "vmResume", "close"]
        with pytest.raises(ovm.StateError, match="is not running"):
            await machine.vm_state()
    await home.nothing_left()


async def test_it_is_found_from_another_session(home: homes.Home) -> None:
    """One without the runtime directory of that in which it was started: cron's, or that of another login."""
    home.init()
    socket_dir = (await home.good("start", "--json")).json["podman_socket"]
    other = home.root / "other"
    other.mkdir(mode=0o700)
    home.environment["XDG_RUNTIME_DIR"] = str(other)
    assert (await home.good("ls", "--json")).json[0]["state"] == "running"
    assert (await home.good("start", "--json")).json["podman_socket"] == socket_dir
    assert f"unix://{socket_dir}" in (await home.good("env", "--shell", "sh")).out
    await home.good("stop")
    await home.nothing_left()
    assert str(other) in (await home.good("env", "--shell", "sh")).out


async def test_three_of_twenty_machines_run(home: homes.Home) -> None:
    """Started at the same instant they share no port; the list is right about each."""
    names = [f"m{number:02}" for number in range(20)]
    for name in names:
        home.init(name)
    running = names[3:6]
    infos = [start.json for start in await asyncio.gather(*(home.good("start", name, "--json") for name in running))]
    assert len({info["ssh_port"] for info in infos}) == len({info["podman_socket"] for info in infos}) == 3
    listed = (await home.good("ls", "--json")).json
    assert [row["name"] for row in listed] == names
    assert {row["name"] for row in listed if row["state"] == "running"} == set(running)
    assert {row["state"] for row in listed if row["name"] not in running} == {"stopped"}
    lines = (await home.good("ls", "--format", "{name}={state}")).out.splitlines()
    assert lines[3] == "m03=running"
    refused = await home.run("rm", "-y", "m00", running[0])
    assert (refused.status, "is running" in refused.err) == (1, True)
    assert home.machine("m00").exists()
    await asyncio.gather(*(home.good("stop", "--force", name) for name in running))
    await home.good("rm", "-y", *names)
    assert (await home.good("ls", "--json")).json == []
    await home.nothing_left()


async def test_an_upgrade_of_the_package_changes_nothing_for_it(
    tiny_guest: tiny.Guest, gvproxy: Path, short_path: Path
) -> None:
    """Its code is taken away under it: it has imported all it needs, and does everything as before."""
    source = short_path / "src"
    shutil.copytree(Path(ovm.__file__).parent, source / "ovm")
    home = homes.Home(short_path, tiny_guest, gvproxy, source)
    try:
        home.init()
        await home.good("start")
        home.environment.pop("PYTHONPATH")
        shutil.rmtree(source)
        await home.good("pause")
        await home.good("resume")
        await home.good("port", "add", "22")
        await home.good("events")
        await home.good("info")
        socket_path = next((short_path / "run").rglob("ovm.sock"))
        service = client.Service("default", socket_path)
        for ask in (service.clocksync, lambda: service.prune(p.Prune())):
            with pytest.raises(ovm.UnsupportedError):
                await asyncio.to_thread(ask)
        await home.good("stop")
        assert "imported after" not in home.log()
    finally:
        home.end()


async def test_a_service_of_another_version(
    home: homes.Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of another package it is said; of another interface it is refused, with what helps."""
    home.init()
    adopt(home, monkeypatch)
    told = {"name": "default", "state": "VirtualMachineStateRunning", "step": "", "health": None, "restart_needed": []}
    told |= {"started_at": 1.0, "pid": 12345, "version": "9.9.9", "api": p.API}
    from ovm.registry import machines

    path = machines.find("default").service_socket
    path.parent.mkdir(parents=True, mode=0o700)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps(told).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    async with await asyncio.start_unix_server(answer, path):
        assert "runs ovm 9.9.9" in (await home.run("status")).err
        told |= {"api": p.API + 1, "state": "Dreaming"}
        done = await home.run("status")
        assert (done.status, "is incompatible" in done.err, "ovm stop default" in done.err) == (1, True, True)
        with pytest.raises(ovm.SkewError):
            await ovm.connect()
