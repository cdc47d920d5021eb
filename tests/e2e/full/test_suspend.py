"""A machine with containers is suspended, and goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

import ovm
import under
from full import BUSYBOX_IMAGE, MachineOptions, Podman, busybox_tar, eventually, fetch
from ovm.hypervisors.qemu import QEMU

pytestmark = [pytest.mark.full]

COUNT = "mkdir -p /www; i=0; httpd -p 80 -h /www; while :; do i=$((i + 1)); echo $i >/www/hello; sleep 0.2; done"


@pytest.fixture
async def machine(options_for: MachineOptions, tmp_path: Path) -> AsyncIterator[ovm.OVM]:
    """One of its own, which nobody has to be started again for."""
    made = await under.create(options_for(f"suspended-{tmp_path.name[-1]}"))
    async with made:
        yield made


@under.QEMU_ALONE
async def test_containers_go_on(machine: ovm.OVM, tmp_path: Path) -> None:
    """Counting, reachable by their ports, with the host's time, and kept by podman as before."""
    podman = Podman(machine, tmp_path)
    await podman("import", busybox_tar(tmp_path / "busybox.tar"), BUSYBOX_IMAGE)
    port = (await machine.export_port(0, 1)).host_port
    await machine.unexport_port(port)
    await podman("run", "-d", "--name", "counter", "-p", f"{port}:80", BUSYBOX_IMAGE, "sh", "-c", COUNT)
    pid = (await podman("inspect", "-f", "{{.State.Pid}}", "counter")).out
    await eventually(lambda: fetch(port))
    boot = (await machine.exec(["cat", "/proc/sys/kernel/random/boot_id"])).text

    for _ in range(2):
        before = int(await fetch(port))  # of a file that is just being written
        await machine.suspend()
        await asyncio.sleep(3)  # measured: by more than the 2 s of tolerance below the guest's clock is wrong
        began = time.time()
        await machine.start()
        assert machine.info.not_resumed == ""
        assert (await machine.exec(["cat", "/proc/sys/kernel/random/boot_id"])).text == boot
        guest_s = int((await machine.exec(["date", "+%s"])).text)
        assert began - 2 < guest_s < time.time() + 2, "the clock was set before it was ready"
        assert int(await fetch(port)) >= before
        assert (await podman("inspect", "-f", "{{.State.Pid}}", "counter")).out == pid
        await eventually(partial(_counts_beyond, port, before))
        published = [forward for forward in machine.ports() if forward.purpose == "container"]
        assert [forward.host_port for forward in published] == [port]

    # podman's announcements are heard again
    await podman("rm", "-f", "-t", "0", "counter")
    assert machine.ports() == ()
    assert (await podman("run", "--rm", BUSYBOX_IMAGE, "echo", "again")).out == "again"


async def _counts_beyond(port: int, least: int) -> bool:
    return int(await fetch(port) or 0) > least


@under.QEMU_ALONE
async def test_a_boot_instead_finds_what_was_written(machine: ovm.OVM, tmp_path: Path) -> None:
    """Nobody had synced it by hand."""
    podman = Podman(machine, tmp_path)
    await podman("import", busybox_tar(tmp_path / "busybox.tar"), BUSYBOX_IMAGE)
    write = "echo precious > /data/file"
    await podman("run", "--rm", "-v", "kept:/data", BUSYBOX_IMAGE, "sh", "-c", write)
    await machine.suspend()
    with (machine.options.target_dir / "memory.suspended").open("r+b") as memory:
        memory.write(b"damaged")
    await machine.start()
    assert machine.info.not_resumed == "the saved state is damaged"
    told = await podman("run", "--rm", "-v", "kept:/data", BUSYBOX_IMAGE, "cat", "/data/file")
    assert told.out == "precious"


@under.QEMU_ALONE
async def test_what_cannot_be_saved_runs_on(machine: ovm.OVM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is attended to as before: its ports are opened, its clock can be set."""
    podman = Podman(machine, tmp_path)
    await podman("import", busybox_tar(tmp_path / "busybox.tar"), BUSYBOX_IMAGE)

    async def refuse(_qemu: QEMU, _memory: int, *, timeout_s: float) -> None:
        raise ovm.GuestError(f"not within {timeout_s} s")

    with monkeypatch.context() as patched:
        patched.setattr(QEMU, "save", refuse)
        with pytest.raises(ovm.GuestError, match="not within"):
            await machine.suspend()
    assert machine.state == "VirtualMachineStateRunning"
    await machine.clocksync()
    port = (await machine.export_port(0, 1)).host_port
    await machine.unexport_port(port)
    await podman("run", "-d", "--name", "web", "-p", f"{port}:80", BUSYBOX_IMAGE, "sh", "-c", COUNT)
    await eventually(lambda: fetch(port))


@under.QEMU_ALONE
async def test_a_shared_folder_is_named(options_for: MachineOptions, tmp_path: Path) -> None:
    """A machine with a shared folder cannot be suspended, and the error names the folder."""
    made = await under.create(options_for("sharing"), mounts=[ovm.Mount(tmp_path)])
    with pytest.raises(ovm.UnsupportedError, match=str(tmp_path)):
        await made.suspend()
