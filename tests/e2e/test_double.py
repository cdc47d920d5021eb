"""The double of vfkit runs machines as vfkit does, with the real gvproxy for a network."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import doubles
import tiny
from ovm.wire import http
from ovm.wire.error import WireError

pytestmark = pytest.mark.tiny

DEADLINE_S = 120.0
ECHO_PORT = 7000
HOST_PORT = 1026


@pytest.fixture(scope="session")
def echo_guest(tiny_guest: tiny.Guest, tmp_path_factory: pytest.TempPathFactory) -> tiny.Guest:
    """The tiny guest with a program that can listen on a vsock port."""
    directory = tmp_path_factory.mktemp("echo")
    program, initrd = directory / "echo", directory / "initrd"
    source = Path(__file__).parents[1] / "guest" / "echo.c"
    subprocess.run(["cc", "-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    more = tiny.archive({"bin/vsock-echo": (0o100755, program.read_bytes())})
    initrd.write_bytes(tiny_guest.initrd.read_bytes() + more)
    return tiny.Guest(kernel=tiny_guest.kernel, initrd=initrd, rootfs=tiny_guest.rootfs)


class Double:
    """A double with its log, its REST socket, and the processes of its group."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path, port: int, rest: http.UnixHTTP) -> None:
        self.process, self.directory, self.port, self.rest = process, directory, port, rest

    def log(self) -> str:
        return (self.directory / "vfkit.log").read_text()

    async def logged(self, text: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while text not in self.log():
                assert self.process.returncode is None, self.log()
                await asyncio.sleep(0.02)

    async def tell(self, line: str) -> str:
        return await tiny.tell(self.port, line)

    async def state(self) -> dict[str, Any]:
        return await self.rest.get("/vm/state", dict[str, Any])

    async def order(self, verb: str) -> None:
        await self.rest.post("/vm/state", {"state": verb})

    async def ended(self) -> int:
        """The status it ended with; nothing that it started may have outlived it."""
        async with asyncio.timeout(DEADLINE_S):
            status = await self.process.wait()
            while self.group():
                await asyncio.sleep(0.02)
        return status

    def group(self) -> list[int]:
        """Its process group, but for itself."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                _, state, _, group, *_ = (stat.parent.name, *stat.read_text().rpartition(")")[2].split()[:3])
            except OSError:
                continue
            if int(group) == self.process.pid and state != "Z" and int(stat.parent.name) != self.process.pid:
                found.append(int(stat.parent.name))
        return found


Boot = Callable[..., Any]


@pytest.fixture
def boot(echo_guest: tiny.Guest, gvproxy: Path, short_path: Path) -> Boot:
    """Runs a double with a network, two vsock ports, a share and a console, which is ended with the block."""

    @asynccontextmanager
    async def booted(*words: str, **faults: object) -> AsyncIterator[Double]:
        program = shutil.copy(doubles.vfkit(), short_path / "vfkit")
        (short_path / "double.json").write_text(json.dumps(faults))
        (short_path / "disk").write_bytes(bytes(1 << 20))
        (short_path / "share").mkdir()
        (short_path / "share" / "file").write_text("shared")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        network = await asyncio.create_subprocess_exec(
            gvproxy, "-ssh-port", str(port), "-listen-vfkit", f"unixgram://{short_path}/net.sock",
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(DEADLINE_S):
            while not (short_path / "net.sock").exists():
                await asyncio.sleep(0.01)
        devices = [
            f"virtio-blk,path={echo_guest.rootfs},readonly",
            f"virtio-blk,path={short_path}/disk",
            f"virtio-net,unixSocketPath={short_path}/net.sock,mac=5a:94:ef:e4:0c:ee",
            f"virtio-vsock,port={HOST_PORT},socketURL={short_path}/host.sock,listen",
            f"virtio-vsock,port={ECHO_PORT},socketURL={short_path}/guest.sock,connect",
            f"virtio-fs,sharedDir={short_path}/share,mountTag=share0",
            "virtio-rng",
            f"virtio-serial,logFilePath={short_path}/console.log",
        ]
        argv = [
            program, "--memory", "256", "--kernel", echo_guest.kernel, "--initrd", echo_guest.initrd,
            "--kernel-cmdline", " ".join(["console=hvc0", *(f"tiny.{word}" for word in words)]),
            "--restful-uri", f"unix://{short_path}/rest.sock",
            *(word for device in devices for word in ("--device", device)),
        ]  # fmt: skip
        with (short_path / "vfkit.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(*argv, stdout=log, stderr=log, start_new_session=True)
        try:
            async with http.connect(short_path / "rest.sock") as rest:
                double = Double(process, short_path, port, rest)
                yield double
        finally:
            for helper in (process, network):
                if helper.returncode is None:
                    helper.kill()
                await helper.wait()

    return booted


class Host:
    """A listener of the host's that vsock connections of the guest are passed on to."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard.append(await reader.readline())
        writer.write(b"heard\n")
        writer.close()


async def echo(double: Double, word: bytes) -> bytes:
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_unix_connection(double.directory / "guest.sock")
        writer.write(word)
        answer = await reader.readexactly(len(word))
        writer.close()
        return answer


async def converse(double: Double, host: Host) -> None:
    """Several connections in either direction."""
    host.heard.clear()
    assert await double.tell(f"vsock-echo {ECHO_PORT} 2>&1") == ""
    assert [await echo(double, word) for word in (b"one", b"two", b"three")] == [b"one", b"two", b"three"]
    for number in range(3):
        said = await double.tell(f"(echo {number}; sleep 1) | vsock {HOST_PORT}")
        assert said == "heard\n"
    assert host.heard == [b"0\n", b"1\n", b"2\n"]


async def test_a_machine_talks_over_all_its_devices(boot):
    """Network, console, disks, share and vsock; all of it again after the guest has rebooted."""
    host = Host()
    async with boot("never") as double:
        directory = double.directory
        server = await asyncio.start_unix_server(host, directory / "host.sock")
        await double.tell("true")
        assert "tiny: booted" in (directory / "console.log").read_text()
        assert await double.tell("cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdb/size") == "1\n0\n2048\n"
        assert await double.tell("mkdir /m; mount -t virtiofs share0 /m; cat /m/file; umount /m") == "shared"
        await converse(double, host)

        reader, writer = await asyncio.open_unix_connection(directory / "guest.sock")
        writer.write(b"open")
        assert await reader.readexactly(4) == b"open"
        await tiny.order(double.port, "busybox reboot -f")
        async with asyncio.timeout(DEADLINE_S):
            assert await reader.read() == b""  # the old guest's connection ends with it
        writer.close()
        assert await double.tell("mkdir /m; mount -t virtiofs share0 /m; cat /m/file; umount /m") == "shared"
        await converse(double, host)
        assert (directory / "console.log").read_text().count("tiny: booted") == 2

        await double.tell('until [ -n "$(busybox pidof dd)" ]; do :; done')  # it listens to its power button
        await double.order("Stop")
        assert await double.ended() == 0
        assert "VM is stopped" in double.log()
        assert {path.name for path in directory.glob("*.sock")} == {"host.sock", "net.sock"}
        server.close()


async def test_a_pause_stands_until_it_is_over(boot):
    """While it lasts nothing but an end to it is possible; what is said to the guest meanwhile waits."""
    async with boot("never", "tick") as double:
        await double.tell("true")
        running = {
            "canStart": False, "canPause": True, "canResume": False, "canStop": True, "canHardStop": True,
            "state": "VirtualMachineStateRunning",
        }  # fmt: skip
        assert await double.state() == running
        with pytest.raises(WireError, match="VZErrorDomain"):
            await double.order("Resume")
        assert await double.tell(f"vsock-echo {ECHO_PORT} 2>&1") == ""
        reader, writer = await asyncio.open_unix_connection(double.directory / "guest.sock")
        writer.write(b"before")
        assert await reader.readexactly(6) == b"before"
        await double.order("Pause")
        paused = running | {
            "state": "VirtualMachineStatePaused",
            "canPause": False,
            "canResume": True,
            "canStop": False,
        }
        assert await double.state() == paused
        for verb in ("Stop", "Pause"):
            with pytest.raises(WireError, match="state “paused”") as refused:
                await double.order(verb)
            assert refused.value.status == 500
        console = double.directory / "console.log"
        size = console.stat().st_size
        writer.write(b"meanwhile")
        late = asyncio.create_task(echo(double, b"late"))
        await asyncio.sleep(1)  # measured: the time in which a paused guest does nothing
        assert console.stat().st_size == size
        assert not late.done()
        await double.order("Resume")
        assert await double.tell("echo back") == "back\n"
        assert await reader.readexactly(9) == b"meanwhile"
        assert await late == b"late"
        writer.close()
        with pytest.raises(WireError, match="invalid new VMState: Snooze"):
            await double.order("Snooze")
        assert (await double.rest.get("/vm/inspect", dict[str, Any]))["memoryBytes"] == 256 << 20


async def test_a_hard_stop_ends_it(boot):
    """With or without an answer."""
    async with boot("never") as double:
        await double.logged("waiting for VM to stop")
        answered = await asyncio.gather(double.order("HardStop"), return_exceptions=True)
        assert [getattr(error, "status", 0) for error in answered] == [0]
        assert await double.ended() == 0
        assert "VM is stopped" in double.log()


async def test_a_guest_that_powers_off_ends_it(boot):
    """The double ends with status 0 when the guest powers off."""
    async with boot("off") as double:
        assert await double.ended() == 0
        assert "VM is stopped" in double.log()
        assert "captured" not in double.log()


async def test_sigterm_presses_the_button_and_then_cuts_the_power(boot):
    """The guest has five seconds."""
    async with boot("never", "deaf") as double:
        await double.tell('until [ -n "$(busybox pidof dd)" ]; do :; done')
        double.process.terminate()
        assert await double.ended() == 0
        assert "captured terminated, calling exit handlers and exiting.." in double.log()
        assert "failed to wait for VM stop: timeout waiting for VM state, forcing stop" in double.log()
        assert "the power button was pressed" in (double.directory / "console.log").read_text()


async def test_sigkill_leaves_its_sockets_and_no_process(boot):
    """What vfkit leaves behind too, and its helpers die with it."""
    async with boot("never") as double:
        await double.logged("waiting for VM to stop")
        assert len(double.group()) >= 3
        double.process.kill()
        assert await double.ended() == -signal.SIGKILL
        left = {path.name for path in double.directory.glob("*.sock")}
        assert left >= {"rest.sock", "guest.sock"}
        assert any(name.startswith("vfkit-") for name in left)


@pytest.mark.parametrize(
    "moment", ["network", "rest", "starting", "running", "vsock", "stop", "pause", "resume", "hardstop"]
)
async def test_it_dies_where_it_is_ordered_to(boot, moment):
    """And takes its helpers along."""
    async with boot("never", die_at=moment, die_with="SIGKILL") as double:
        if moment in {"stop", "pause", "resume", "hardstop"}:
            await double.logged("waiting for VM to stop")
            with pytest.raises(WireError):
                await double.order({"hardstop": "HardStop"}.get(moment, moment.title()))
        assert await double.ended() == -signal.SIGKILL


async def test_a_slow_start_fails(boot):
    """vfkit waits five seconds."""
    async with boot("never", slow_starting_s=60) as double:
        await double.logged("Adding virtio-serial")
        while not (double.directory / "rest.sock").exists():
            await asyncio.sleep(0.01)
        assert (await double.state())["state"] in {"VirtualMachineStateStopped", "VirtualMachineStateStarting"}
        assert await double.ended() == 1
        assert double.log().rstrip().endswith("timeout waiting for VM state")


async def test_an_error_of_the_framework_ends_it(boot):
    """An error of the virtualization framework ends the double with status 1."""
    async with boot("never", error_after_s=0.2) as double:
        assert await double.ended() == 1
        assert double.log().rstrip().endswith("virtualization error: hypervisor virtualization error")


async def test_faults_of_its_rest(boot):
    """Verbs that are refused, ignored, or done without an answer."""
    faults = {
        "refuse": {"Pause": "The machine is too busy."}, "lose_answer": ["Resume"], "lose_hardstop_answer": True,
        "ignore_stop": True, "ignore_hardstop": True, "no_can_fields": True, "ignore_sigterm": True,
    }  # fmt: skip
    async with boot("never", **faults) as double:
        await double.logged("waiting for VM to stop")
        assert await double.state() == {"state": "VirtualMachineStateRunning"}
        with pytest.raises(WireError, match=r"Code=1 .*too busy") as refused:
            await double.order("Pause")
        assert refused.value.status == 500
        for verb in ("Resume", "HardStop"):
            with pytest.raises(WireError) as lost:
                await double.order(verb)
            assert lost.value.status == 0
        await double.order("Stop")
        os.kill(double.process.pid, signal.SIGTERM)
        await double.logged("captured terminated")
        assert await double.state() == {"state": "VirtualMachineStateRunning"}


async def test_a_pause_that_takes_its_time(boot):
    """It is seen while it is done; nobody is told that it is."""
    async with boot("never", slow_pause_s=2, lose_answer=["Pause"]) as double:
        await double.logged("waiting for VM to stop")
        pausing = asyncio.create_task(double.order("Pause"))
        async with asyncio.timeout(DEADLINE_S):
            while (await double.state())["state"] != "VirtualMachineStatePausing":
                await asyncio.sleep(0.01)
        with pytest.raises(WireError) as lost:
            await pausing
        assert lost.value.status == 0
        assert (await double.state())["state"] == "VirtualMachineStatePaused"


async def test_a_rest_that_hangs(boot):
    """It takes a request, and that is all."""
    async with boot("never", hang_rest=True) as double:
        await double.logged("waiting for VM to stop")
        with pytest.raises(WireError) as lost:
            await double.rest.get("/vm/state", dict[str, Any], timeout_s=0.5)
        assert lost.value.status == 0
