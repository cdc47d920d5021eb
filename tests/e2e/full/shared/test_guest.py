"""The guest itself: commands, shared folders, what it was told at boot, and its clock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

import ovm
import under
from full import BUSYBOX_IMAGE, Podman, eventually, running

pytestmark = pytest.mark.full

PAUSE_S = 10
"""A minute and more is in tests/faults/test_clocks.py."""


async def test_exec_tells_status_and_streams(vm: ovm.OVM) -> None:
    """A command's status, its two outputs and its input are its own, and no shell comes between."""
    ended = await vm.exec(["sh", "-c", "cat; echo to stderr >&2; exit 7"], stdin=b"to stdout")
    assert (ended.exit_status, ended.stdout, ended.stderr) == (7, b"to stdout", b"to stderr\n")
    odd = ["printf", "%s|", "a b", "'", '"', "$HOME", "new\nline", "ü"]
    assert (await vm.exec(odd)).text == "a b|'|\"|$HOME|new\nline|ü|"
    pieces: list[bytes] = []
    streamed = await vm.exec(["sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.2; done"], on_stdout=pieces.append)
    assert streamed.stdout == b""
    assert b"".join(pieces) == b"1\n2\n3\n"
    assert len(pieces) > 1
    assert (await vm.exec(["sh", "-c", "kill -9 $$"])).exit_status == 137
    with pytest.raises(ovm.ExecTimeout):
        await vm.exec(["sleep", "1000"], timeout_s=1)


async def test_the_boot_configuration_arrived(vm: ovm.OVM) -> None:
    """Host name, time zone, environment and the extra certificate authority are as ordered."""
    told = await vm.exec(["sh", "-c", 'hostname; date +%z; echo "$OVM_TEST_VARIABLE"'])
    assert told.text.splitlines() == ["ovm", "+0530", 'with "quotes" and spaces']


async def test_the_system_is_sound(vm: ovm.OVM) -> None:
    """No unit failed, the root disk is read-only, passwords are refused and mitigations are on."""
    assert (await vm.exec(["systemctl", "--failed", "--plain", "--no-legend"])).text == ""
    assert (await vm.exec(["cat", "/sys/block/vda/ro"])).text == "1"
    config = (await vm.exec(["sshd", "-T"])).text.lower().splitlines()
    assert "passwordauthentication no" in config
    assert "kbdinteractiveauthentication no" in config
    assert "permitrootlogin without-password" in config
    asked, told = (await vm.exec(["cat", "/proc/cmdline"])).text, vm.options.kernel_cmdline
    assert "mitigations" not in asked.removesuffix(told), "the tests ask for it, and nobody else"


async def test_mounts(vm: ovm.OVM, podman: Podman, shared: tuple[Path, Path]) -> None:
    """A shared folder shows the host's files both ways, in containers too; a read-only one takes no writes."""
    if not vm.options.mounts:
        pytest.skip("no virtiofsd on this host")
    writable, _ = shared
    arguments = ["--rm", "-v", f"{writable}:/shared", BUSYBOX_IMAGE]
    await podman("run", *arguments, "sh", "-c", "cat /shared/from-host && echo from a container > /shared/answer")
    assert (writable / "answer").read_text() == "from a container\n"
    assert (await vm.exec(["cat", "/mnt/read only/from-host"])).text == "hello from the host"
    refused = await vm.exec(["touch", "/mnt/read only/new"])
    assert refused.exit_status != 0
    assert b"Read-only file system" in refused.stderr


async def test_pause_stops_a_container_and_resume_lets_it_go_on(vm: ovm.OVM, podman: Podman) -> None:
    """While paused a container's counter stands still; afterwards it goes on, and the guest's clock is right."""
    count = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.2; done"
    async with running(podman, BUSYBOX_IMAGE, "sh", "-c", count) as container:

        async def counted() -> int:
            return int((await podman("logs", "--tail", "1", container)).out or 0)

        await eventually(counted)
        seen: list[str] = []
        removers = [vm.on("vmPause", lambda: seen.append("pause")), vm.on("vmResume", lambda: seen.append("resume"))]
        before = await counted()
        await vm.vm_pause()
        await vm.vm_pause()
        assert (await vm.vm_state()).state is ovm.VMState.PAUSED
        assert vm.info.podman_socket.exists()
        with pytest.raises(ovm.StateError, match="paused"):
            await vm.exec(["true"])
        await asyncio.sleep(10)  # measured: how far the container counts in this time
        await vm.vm_resume()
        await vm.vm_resume()
        at_once = await counted()
        assert (await vm.vm_state()).state is ovm.VMState.RUNNING
        assert at_once - before < 40, "ten seconds would have been fifty"

        async def goes_on() -> bool:
            return await counted() > at_once

        await eventually(goes_on)
        assert seen == ["pause", "resume"]
        for remove in removers:
            remove()


@contextlib.asynccontextmanager
async def time_server(directory: Path) -> AsyncIterator[None]:
    """A chronyd that serves this host's time on 127.0.0.1:123, and sets nothing itself."""
    config = directory / "chrony.conf"
    config.write_text(
        f"local stratum 3\nallow all\nbindaddress 127.0.0.1\ncmdport 0\nbindcmdaddress /\npidfile {directory}/pid\n"
    )
    program = under.program("chronyd")
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program, "-x", "-d", "-u", "root", "-f", str(config), stdout=log, stderr=log
        )
    try:
        yield
        assert process.returncode is None, (directory / "log").read_text()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_clock(vm: ovm.OVM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The guest's clock is the host's after a pause, and chrony then follows a real time server."""
    if os.geteuid() != 0:
        pytest.skip("serving NTP takes root: its port is 123")
    transport = httpx2.AsyncHTTPTransport(uds=str(vm.options.socket_dir / "network.sock"))
    async with httpx2.AsyncClient(transport=transport) as gvproxy, time_server(tmp_path):
        for zone, name in (("ntp.org.", "pool"), ("apple.com.", "time"), ("windows.com.", "time")):
            body = {"Name": zone, "Records": [{"Name": name, "IP": "192.168.127.254"}]}
            (await gvproxy.post("http://gvproxy/services/dns/add", json=body)).raise_for_status()
        await vm.vm_pause()
        await asyncio.sleep(PAUSE_S)  # measured: the guest's clock after a pause this long
        began = time.perf_counter()
        await vm.vm_resume()
        resumed_ms = (time.perf_counter() - began) * 1000
        found = await vm.clocksync()
        with capsys.disabled():
            print(
                f"\nafter a pause of {PAUSE_S} s: resume with clocksync took {resumed_ms:.0f} ms, the guest's clock "
                f"was {found.offset_before_s * 1000:+.2f} ms off (round trip {found.round_trip_s * 1000:.2f} ms)"
            )
        assert abs(found.offset_before_s) < 0.1
        assert abs(found.offset_after_s) <= max(0.002, found.round_trip_s)

        async def selected() -> bool:
            sources = (await vm.exec(["chronyc", "-n", "sources"])).text
            return "^*" in sources

        await eventually(selected, timeout_s=120)
        assert "192.168.127.254" in (await vm.exec(["chronyc", "-n", "sources"])).text


async def test_the_user_has_one_connection(vm: ovm.OVM) -> None:
    """However many commands are run, one ssh connection serves them."""
    await asyncio.gather(*(vm.exec(["true"]) for _ in range(5)))
    sshd = "awk '$2 ~ /:0016$/ && $4 == \"01\"' /proc/net/tcp /proc/net/tcp6 | wc -l"
    assert (await vm.exec(["sh", "-c", sshd])).text == "1"
