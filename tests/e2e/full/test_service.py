"""A machine of the full guest that a service holds: its commands, and the REST that other languages speak."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import homes
import ovm
import under
from full import eventually, fetch
from ovm.network.host_ports import free_port

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform != "linux", reason="there is no image for vfkit here"),
    pytest.mark.asyncio(loop_scope="module"),
]

SERVE = "mkdir -p /tmp/web; echo opened > /tmp/web/hello; busybox httpd -p 8080 -h /tmp/web"
SLEEPS = "for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$p; echo; done | grep -c '^sleep 4242'"


@pytest.fixture(scope="module")
def port() -> int:
    """One of the host's that is free."""
    found = free_port("tcp", "127.0.0.1", 0)
    assert found is not None
    return found


@pytest.fixture(scope="module")
async def home(image: Path, gvproxy: Path, short_tmp: Callable[[str], Path], port: int) -> AsyncIterator[homes.Home]:
    """With the machine ``default``, which runs."""
    made = homes.Home(short_tmp("service"), image, gvproxy)
    try:
        made.init(cpus=2, memory=1536, disk=4096, ports=[f"{port}:8080"], hostname="dev")
        await made.good("start")
        yield made
    finally:
        made.end()


@pytest.fixture
async def machine(home: homes.Home, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ovm.RemoteOVM]:
    """The same in the words of the library."""
    for name, value in home.environment.items():
        monkeypatch.setenv(name, value)
    async with await ovm.connect() as connected:
        yield connected


async def rest(home: homes.Home, path: str, *arguments: str, body: Any = None) -> str:
    """What curl, which knows nothing of ovm, gets."""
    (socket,) = (home.root / "run").rglob("ovm.sock")
    argv = [under.program("curl"), "-sS", "-m", "60", "--unix-socket", str(socket), *arguments]
    if body is not None:
        argv += ["-H", "content-type: application/json", "-d", json.dumps(body)]
    process = await asyncio.create_subprocess_exec(*argv, f"http://ovm{path}", stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_programs_run_in_it(home: homes.Home, tmp_path: Path) -> None:
    """Their words, input, output and status are theirs; files go in and out."""
    assert (await home.good("exec", "--", "printf", "%s|", "a b", "$HOME", "*")).out == "a b|$HOME|*|"
    assert (await home.run("exec", "default", "--", "sh", "-c", "echo wrong >&2; exit 7")).status == 7
    assert (await home.good("ssh", "--", "hostname")).out == "dev\n"
    sent, got = tmp_path / "sent", tmp_path / "got"
    sent.mkdir()
    (sent / "file with spaces").write_bytes(os.urandom(100_000))
    await home.good("cp", str(sent), "default:/var/tmp/kept")
    await home.good("cp", "default:/var/tmp/kept", str(got))
    assert (got / "file with spaces").read_bytes() == (sent / "file with spaces").read_bytes()


async def test_ports_of_its_settings_are_open(home: homes.Home, port: int) -> None:
    """The service opens the ports that the machine's settings list."""
    await home.good("exec", "--", "sh", "-c", SERVE)

    async def served() -> bool:
        return await fetch(port) == "opened"

    await eventually(served)
    (row,) = (await home.good("port", "ls", "--json")).json
    assert (row["host"], row["guest"]) == (f"127.0.0.1:{port}", 8080)


async def test_output_comes_as_it_is_made(machine: ovm.RemoteOVM) -> None:
    """From the first line on, and both streams; what is given is read, whole."""
    first = asyncio.Event()
    heard = bytearray()

    def hear(content: bytes) -> None:
        heard.extend(content)
        first.set()

    script = "echo first; read go </run/go; cat; echo $WORD >&2; exit 3"
    await machine.exec(["mkfifo", "/run/go"])
    given = os.urandom(300_000)
    running = asyncio.create_task(
        machine.exec(["sh", "-c", script], stdin=given, environment={"WORD": "x y"}, on_stdout=hear)
    )
    async with asyncio.timeout(60):
        await first.wait()
        assert bytes(heard) == b"first\n"
        await machine.exec(["sh", "-c", "echo go >/run/go"])
        ended = await running
    assert (ended.exit_status, ended.stderr) == (3, b"x y\n")
    assert bytes(heard) == b"first\n" + given


async def test_whoever_hangs_up_ends_the_command(machine: ovm.RemoteOVM) -> None:
    """A client that disconnects ends the command it started in the guest."""
    running = asyncio.create_task(machine.exec(["sleep", "4242"]))

    async def sleeps(count: str) -> bool:
        return (await machine.exec(["sh", "-c", SLEEPS])).text == count

    await eventually(lambda: sleeps("1"))
    running.cancel()
    await asyncio.wait({running})
    await eventually(lambda: sleeps("0"))
    with pytest.raises(ovm.ExecTimeout):
        await machine.exec(["sleep", "4242"], timeout_s=0.5)
    await eventually(lambda: sleeps("0"))


async def test_other_languages_drive_it(home: homes.Home) -> None:
    """By curl: the engine's answer, a command's output piece by piece, logs, events from any of them on."""
    info = json.loads(await rest(home, "/v1/info"))
    argv = [under.program("curl"), "-sS", "--unix-socket", info["podman_socket"], "http://d/_ping"]
    ping = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert (await ping.communicate())[0] == b"OK"
    body = {"argv": ["sh", "-c", "cat; echo err >&2"], "stdin": base64.b64encode(b"in").decode()}
    pieces = [json.loads(line) for line in (await rest(home, "/v1/exec", body=body)).splitlines()]
    assert pieces[-1] == {"exit_status": 0}
    for stream, content in (("stdout", b"in"), ("stderr", b"err\n")):
        assert b"".join(base64.b64decode(piece[stream]) for piece in pieces if stream in piece) == content
    assert "console" in json.loads(await rest(home, "/v1/logs"))
    assert len((await rest(home, "/v1/log?name=service&lines=1")).splitlines()) <= 1
    assert "no log is called" in await rest(home, "/v1/log?name=../../etc/passwd")
    refused = json.loads(await rest(home, "/v1/ports/add", body={"guest_port": 0}))
    assert refused["error"]["code"] == "invalid-option"
    told = await rest(home, "/v1/events?follow=false", "-H", "Last-Event-ID: 3")
    assert [int(line.removeprefix("id: ")) for line in told.splitlines() if line.startswith("id: ")][:2] == [4, 5]


async def test_its_clock_is_set_and_its_room_given_back(home: homes.Home) -> None:
    """The commands set the guest's clock and remove what podman does not use."""
    await home.good("exec", "--", "date", "-s", "@1000000000")
    assert (await home.good("clocksync", "--json")).json["offset_before_s"] < -1e8
    assert abs((await home.good("clocksync", "--json")).json["offset_before_s"]) < 0.5
    assert (await home.good("prune", "-y", "--all", "--json")).json["failures"] == []


async def test_what_is_in_it_stays(home: homes.Home) -> None:
    """Over a restart with a larger disk, files restored, and a service that was killed; not over a reset of data."""
    kept = "/var/lib/containers/kept"
    await home.good("exec", "--", "sh", "-c", f"echo precious > {kept}; sync")

    async def is_kept() -> bool:
        return (await home.good("exec", "--", "cat", kept)).out == "precious\n"

    await home.good("config", "set", "disk", "6G")
    assert (await home.status())["restart_needed"] == ["disk"]
    await home.good("restart")
    assert await is_kept()
    size = (await home.good("exec", "--", "df", "--output=size", "-B1M", "/var/lib/containers")).out.split()[-1]
    assert 5000 < int(size) <= 6144
    refused = await home.run("config", "set", "disk", "5G")
    assert (refused.status, "cannot shrink" in refused.err) == (1, True)
    await home.good("reset", "-y")
    assert await is_kept()
    os.kill((await home.status())["pid"], signal.SIGKILL)
    await home.nothing_runs()
    await home.good("start")
    assert await is_kept()
    asked = await home.run("reset", "--data")
    assert (asked.status, "--yes" in asked.err) == (2, True)
    assert await is_kept()
    await home.good("reset", "-y", "--data")
    assert (await home.run("exec", "--", "test", "-e", kept)).status == 1
    await home.good("stop")
    await home.nothing_left()
    await home.good("rm", "-y", "default")
    assert not home.machine("default").exists()


async def test_a_start_tells_what_took_how_long(home: homes.Home, tmp_path: Path) -> None:
    """Of the machine that runs: as a table, in JSON, and as a picture with the units of its systemd."""
    picture = tmp_path / "start.svg"
    done = await home.good("start", "--timings", "--timeline", str(picture))
    for words in ("host: hypervisor", "guest: kernel", "guest: systemd to ready", "ovm-podman.service"):
        assert words in done.err
    assert "ovm-podman.service" in picture.read_text()
    ET.fromstring(picture.read_text())
    timings = {stage["name"]: stage for stage in (await home.good("info", "--json")).json["timings"]}
    told = timings["guest: ready"]
    assert 0 < told["uptime_ms"] < told["ms"]
    assert timings["hypervisor"]["uptime_ms"] is None
    refused = await home.run("start", "--timeline", str(tmp_path / "nowhere" / "start.svg"))
    assert refused.status == 2
