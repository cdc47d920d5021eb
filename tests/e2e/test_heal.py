"""What dies under a running machine, and what becomes of the machine."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ovm
import tiny
import under
from ovm.hypervisors.qemu import QEMU

pytestmark = pytest.mark.tiny

WRITE = "busybox dd if=/dev/urandom of=/dev/vdb bs=1M seek=1 count=8 conv=fsync && echo written"


@under.QEMU_ALONE
async def test_a_new_gvproxy_takes_the_place_of_a_dead_one(machines: tiny.Machines) -> None:
    """The guest is reached by the same ports, was not reset, and both ends of the trouble are told."""
    machine = await machines("m")
    await machine.ovm.start()
    exported = await machine.ovm.export_port(0, 22)
    before = machine.ovm.info
    for round_ in (1, 2):
        dead = machine.helper("gvproxy")
        os.kill(dead, signal.SIGKILL)
        await machine.until(event="health", count=2 * round_)
        assert machine.helper("gvproxy") != dead
        assert await tiny.tell(exported.host_port, "echo there") == "there\n"
        assert await machine.tell("echo there too") == "there too\n"
    assert machine.ovm.ports() == (exported,)
    assert machine.ovm.info.ssh_port == before.ssh_port
    assert "killed by SIGKILL" in machine.healths[0].problems[0]
    assert machine.healths[1].ok
    assert machine.states == ["Running"] * 5
    await machine.ovm.stop()
    assert machine.events == ["ready", *["health"] * 4, "close"]
    assert machine.errors == []


@under.QEMU_ALONE
async def test_what_the_guest_sends_meanwhile_does_not_hold_it_up(
    machines: tiny.Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment its card leads nowhere, here for so long that it surely sends something."""
    execute = QEMU._execute

    async def slowly(vm: QEMU, name: str, **arguments: Any) -> Any:
        if name == "netdev_add":
            await asyncio.sleep(1.5)  # measured: the guest pings once a second meanwhile
        return await execute(vm, name, **arguments)

    monkeypatch.setattr(QEMU, "_execute", slowly)
    machine = await machines()
    async with machine.ovm:
        await machine.order("while :; do busybox ping -c 1 -W 1 192.168.127.1; done")
        os.kill(machine.helper("gvproxy"), signal.SIGKILL)
        await machine.until(event="health", count=2)
        assert await machine.tell("echo here") == "here\n"
        assert machine.errors == []


@under.QEMU_ALONE
async def test_a_stop_while_the_network_is_brought_back(machines: tiny.Machines) -> None:
    """The stop wins, and nothing is left."""
    machine = await machines("m")
    await machine.ovm.start()
    os.kill(machine.helper("gvproxy"), signal.SIGKILL)
    await machine.until(event="health")
    await machine.ovm.stop()
    assert machine.events == ["ready", "health", "close"]
    assert await machines.leftovers() == []


@under.QEMU_ALONE
async def test_a_gvproxy_that_dies_while_the_guest_reboots_is_replaced(machines: tiny.Machines) -> None:
    """The guest is ready again, and reached by the same ports through another gvproxy."""
    machine = await machines("m")
    await machine.ovm.start()
    exported = await machine.ovm.export_port(0, 22)
    dead = machine.helper("gvproxy")
    await machine.order("busybox reboot -f")
    await machine.until(state="Starting", count=2)
    os.kill(dead, signal.SIGKILL)
    await machine.until(event="ready", count=2)
    assert machine.helper("gvproxy") != dead
    assert await tiny.tell(exported.host_port, "echo there") == "there\n"
    await machine.ovm.stop()
    assert [name for name in machine.events if name != "health"] == ["ready", "ready", "close"]
    assert machine.errors == []


@under.QEMU_ALONE
async def test_a_gvproxy_that_cannot_be_started_again_ends_the_machine(machines: tiny.Machines) -> None:
    """It is tried some times; then the machine is started again, which fails for the same reason, and that is told."""
    machine = await machines("m")
    await machine.ovm.start()
    program = Path(machines.root / "m" / "target" / machines.gvproxy.name)
    program.unlink()
    os.kill(machine.helper("gvproxy"), signal.SIGKILL)
    for count in (1, 2):
        await machine.until(event="close", count=count)
    assert [type(error) for error in machine.errors] == [ovm.HelperExited, ovm.FileError]
    assert machine.state == "Stopped"


@under.VFKIT_ALONE
async def test_a_lost_network_restarts_the_machine(machines: tiny.Machines) -> None:
    """vfkit learns its gvproxy once: the guest is shut down, and the machine is ready again by itself."""
    machine = await machines("m")
    await machine.ovm.start()
    os.kill(machine.helper("gvproxy"), signal.SIGKILL)
    await machine.until(event="close")
    await machine.until(event="ready", count=2)
    assert await machine.tell("echo there") == "there\n"
    await machine.ovm.stop()
    assert [name for name in machine.events if name != "health"] == ["ready", "error", "close", "ready", "close"]
    assert "gvproxy" in machine.errors[0].message


@under.VFKIT_ALONE
async def test_a_network_that_is_lost_again_at_once_stops_the_machine(machines: tiny.Machines) -> None:
    """A machine that cannot keep its network is not restarted for ever."""
    machine = await machines("m")
    await machine.ovm.start()
    for count in (1, 2):
        await machine.until(event="ready", count=count)
        os.kill(machine.helper("gvproxy"), signal.SIGKILL)
        await machine.until(event="close", count=count)
    assert machine.ovm._life._keeper is not None
    await asyncio.wait_for(asyncio.shield(machine.ovm._life._keeper), 30)
    assert machine.state == "Stopped"
    assert machine.events.count("ready") == 2


@under.VFKIT_ALONE
async def test_a_lost_network_stops_the_machine(machines: tiny.Machines) -> None:
    """As was ordered."""
    machine = await machines("m", network_loss="stop")
    await machine.ovm.start()
    os.kill(machine.helper("gvproxy"), signal.SIGKILL)
    await machine.until(event="close")
    assert [name for name in machine.events if name != "health"] == ["ready", "error", "close"]
    assert machine.state == "Stopped"


@under.VFKIT_ALONE
async def test_a_restart_can_be_stopped(machines: tiny.Machines) -> None:
    """A stop ends a machine that is about to start again by itself."""
    machine = await machines("m")
    await machine.ovm.start()
    os.kill(machine.helper("gvproxy"), signal.SIGKILL)
    await machine.until(state="Starting", count=2)
    await machine.ovm.stop()
    assert machine.state == "Stopped"
    assert await machines.leftovers() == []


async def test_a_dead_guard_ends_the_machine_at_once(machines: tiny.Machines) -> None:
    """From then on nothing would end the helpers if the manager died: they end now, within 2 s."""
    machine = await machines("m")
    await machine.ovm.start()
    helpers = [child.pid for child in machine.ovm._context.session.children if child.name != "guard"]  # type: ignore[union-attr]
    killed_at = time.monotonic()
    os.kill(machine.helper("guard"), signal.SIGKILL)
    while any(Path(f"/proc/{pid}").exists() for pid in helpers):
        await asyncio.sleep(0.01)
    took = time.monotonic() - killed_at
    await machine.until(event="close")
    assert took < 2.0
    assert "guard" in machine.errors[0].message
    assert "killed by SIGKILL" in machine.errors[0].exit_reason


async def test_a_panic_is_told_with_its_words(machines: tiny.Machines) -> None:
    """The guest boots again; what it died of is an error event, not a riddle."""
    machine = await machines("m")
    await machine.ovm.start()
    await machine.order("echo c >/proc/sysrq-trigger")
    await machine.until(event="ready", count=2)
    (error,) = machine.errors
    assert "sysrq triggered crash" in error.message
    assert any("Call Trace" in line for line in error.log_tail)
    assert [name for name in machine.events if name != "health"] == ["ready", "error", "ready"]
    await machine.order("busybox reboot -f")  # which is none, although the console still tells of one
    await machine.until(event="ready", count=3)
    assert machine.errors == [error]


@pytest.fixture
def small_disk(short_path: Path) -> Iterator[Path]:
    """A file system with room for little."""
    if os.geteuid():
        pytest.skip("only root may mount")
    directory = short_path / "m" / "target"
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128M", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


@under.QEMU_ALONE
async def test_a_full_host_stops_the_guest_until_there_is_room(small_disk: Path, machines: tiny.Machines) -> None:
    """State, event and error say why; with room again it goes on by itself, and nothing of what it wrote is lost."""
    machine = await machines("m")
    machine.collaborate(room_again_s=0.5)
    await machine.ovm.start()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free(small_disk) - (2 << 20)))
    writing = asyncio.create_task(machine.tell(WRITE))
    await machine.until(event="health")
    assert machine.state == "Error"
    assert (await machine.ovm.vm_state()).state is ovm.VMState.ERROR
    assert (await machine.ovm.vm_state()).can_resume
    assert "No space left" in machine.errors[0].message
    assert "vm_resume" in machine.errors[0].hint
    assert not writing.done()
    filler.unlink()
    assert (await asyncio.wait_for(writing, 60)).endswith("written\n")
    assert machine.state == "Running"
    assert not any("hypervisor" in problem for problem in (await machine.ovm.check_health()).problems)


@under.QEMU_ALONE
async def test_a_guest_whose_disk_is_full_can_be_resumed_in_vain_and_stopped(
    small_disk: Path, machines: tiny.Machines
) -> None:
    """Without room it stops again at once; a stop ends it, as it cannot shut down."""
    machine = await machines("m")
    await machine.ovm.start()
    (small_disk / "filler").write_bytes(bytes(free(small_disk) - (2 << 20)))
    writing = asyncio.create_task(machine.tell(WRITE))
    await machine.until(event="error")
    await machine.ovm.vm_resume()
    await machine.until(event="error", count=2)
    assert machine.state == "Error"
    steps: list[str] = []
    await asyncio.wait_for(machine.ovm.stop(progress=steps.append), 60)
    assert steps[-1].startswith("cutting the guest's power")
    writing.cancel()


def free(directory: Path) -> int:
    room = os.statvfs(directory)
    return room.f_bavail * room.f_frsize


async def test_each_step_of_a_stop_is_told(machines: tiny.Machines) -> None:
    """To whoever asked, to those who joined, and a listener that fails hurts nobody."""
    machine = await machines("m", "deaf")
    await machine.ovm.start()
    first: list[str] = []
    second: list[str] = []

    def fails(_step: str) -> None:
        raise RuntimeError

    stopping = asyncio.create_task(machine.ovm.stop(timeout_s=3, progress=first.append))
    await asyncio.sleep(0)
    await asyncio.gather(machine.ovm.stop(progress=fails), machine.ovm.stop(progress=second.append), stopping)
    assert first == [
        "pressing the guest's power button",
        "cutting the guest's power: it has not shut down within 3 s",
    ]
    assert second == first
    with pytest.raises(ovm.OptionError):
        await machine.ovm.stop(timeout_s=-1)


@under.QEMU_ALONE  # which tells of resets; under vfkit the guest goes on booting until the deadline
async def test_a_kernel_that_falls_before_its_first_word_is_given_a_second_try(
    machines: tiny.Machines, caplog: pytest.LogCaptureFixture
) -> None:
    """And no third: one that has no program to run falls again."""
    machine = await machines("m")
    machine.ovm._context.prepared = dataclasses.replace(
        machine.ovm._context.prepared,
        options=dataclasses.replace(machine.ovm.options, kernel_cmdline="rdinit=/nowhere"),
    )
    with pytest.raises(ovm.StartError, match="kernel panic"):
        await machine.ovm.start()
    assert [record for record in caplog.records if "starting it again" in record.message]
    logs = sorted(path.name for path in machine.ovm.options.log_dir.glob("console*.log"))
    assert logs == ["console.2.log", "console.log"]
    assert machine.transitions == ["Starting", "Stopped"] * 2
    assert machine.events == ["error", "close"]
    assert await machines.leftovers() == []


async def test_a_kernel_that_hangs_before_its_first_word_is_given_a_second_try(
    machines: tiny.Machines, caplog: pytest.LogCaptureFixture
) -> None:
    """As one on a busy host may; nobody has to wait until the start's deadline for it."""
    machine = await machines("m")
    machine.collaborate(first_word_s=20.0)
    with (machine.ovm.options.target_dir / "data.img").open("r+b") as disk:
        disk.write(b"hang")  # which the guest takes away before it does it
    await machine.ovm.start()
    assert "the guest's kernel has sent no message for 20 s" in caplog.text
    assert machine.transitions == ["Starting", "Stopped", "Starting", "Running"]
    assert machine.events == ["ready"]
    await machine.ovm.stop()
    assert await machines.leftovers() == []
