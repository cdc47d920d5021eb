"""A machine is suspended to disk, and a start goes on from there, or boots and says why."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import ovm
import tiny
import under
from ovm.disks import saved_state
from ovm.paths import TargetPaths

pytestmark = [pytest.mark.tiny]

MANAGER = Path(__file__).parent / "suspending.py"
DEADLINE_S = 120.0


def of(m: tiny.Machine) -> TargetPaths:
    return TargetPaths(m.ovm.options.target_dir)


def is_kept(m: tiny.Machine) -> list[bool]:
    return [of(m).suspended.exists(), of(m).memory.exists()]


async def asleep(machines: tiny.Machines, **more: object) -> tiny.Machine:
    """A suspended machine; in its memory alone there is a file /kept."""
    m = await machines("m", **more)
    await m.ovm.start()
    await m.tell("echo precious >/kept")
    await m.ovm.suspend()
    m.events.clear()
    m.transitions.clear()
    return m


async def kept(m: tiny.Machine) -> str:
    return (await m.tell("cat /kept 2>/dev/null")).strip()


@under.QEMU_ALONE
async def test_it_goes_on_where_it_was(machines: tiny.Machines) -> None:
    """A resumed machine has its memory, ports and address of before, and uses its saved state up."""
    m = await machines()
    await m.ovm.start()
    await m.tell("echo precious >/kept")
    port = (await m.ovm.export_port(0, 22)).host_port
    boots = m.console().count("tiny: booted")
    await m.ovm.suspend()
    assert m.transitions[-2:] == ["Saving", "Stopped"]
    assert m.events == ["ready", "close"]
    assert m.errors == []
    assert await machines.leftovers() == []
    for path in (of(m).memory, of(m).suspended):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ovm.StateError, match="stopped"):
        await m.ovm.suspend()
    assert all(is_kept(m))

    for _ in range(2):  # what has gone on can be suspended again
        m.transitions.clear()
        steps: list[str] = []
        await m.ovm.start(progress=steps.append)
        assert m.transitions == ["Restoring", "Running"]
        assert steps == ["guard", "network", "hypervisor", "memory", "guest", "ready"]
        assert m.ovm.info.not_resumed == ""
        assert is_kept(m) == [False, False], "it is used up"
        assert await kept(m) == "precious"
        assert [forward.host_port for forward in m.ovm.ports()] == [port]
        assert await tiny.tell(port, "echo here") == "here\n"
        assert "tiny: booted" not in m.console()
        await m.ovm.suspend()
    await m.ovm.start()
    assert boots == 1

    # its kernel and initrd are there for a reboot, too
    await m.order("busybox reboot -f")
    await m.until(event="ready", count=5)
    assert await kept(m) == ""
    await m.ovm.stop()
    assert is_kept(m) == [False, False]


@under.QEMU_ALONE
async def test_a_paused_one_runs_again(machines: tiny.Machines) -> None:
    """A machine that was suspended while it was paused runs after its resume."""
    m = await machines()
    await m.ovm.start()
    await m.tell("echo precious >/kept")
    await m.ovm.vm_pause()
    await m.ovm.suspend()
    await m.ovm.start()
    assert m.state == "Running"
    assert await kept(m) == "precious"


@under.QEMU_ALONE
async def test_a_start_that_is_not_to_resume_boots(machines: tiny.Machines) -> None:
    """A start with resume=False boots and deletes the saved state."""
    m = await asleep(machines)
    await m.ovm.start(resume=False)
    assert m.transitions == ["Starting", "Running"]
    assert await kept(m) == ""
    assert m.ovm.info.not_resumed == "", "nobody wanted it"
    assert is_kept(m) == [False, False]


@under.QEMU_ALONE
async def test_restored_files_are_another_machines(machines: tiny.Machines) -> None:
    """reset_path() deletes the saved state, and the next start boots."""
    m = await asleep(machines)
    await m.ovm.reset_path()
    assert is_kept(m) == [False, False]
    await m.ovm.start()
    assert await kept(m) == ""


def cut_memory(m: tiny.Machine) -> None:
    os.truncate(of(m).memory, of(m).memory.stat().st_size // 2)


def flip_memory(m: tiny.Machine) -> None:
    with of(m).memory.open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 4]))


def lose_memory(m: tiny.Machine) -> None:
    of(m).memory.unlink()


def cut_record(m: tiny.Machine) -> None:
    os.truncate(of(m).suspended, 100)


def other_version(m: tiny.Machine) -> None:
    told = msgspec.json.decode(of(m).suspended.read_bytes().splitlines()[0]) | {"format": 99}
    line = msgspec.json.encode(told)
    of(m).suspended.write_bytes(line + b"\n%08x\n" % saved_state._crc32(line))


def write_disk(m: tiny.Machine) -> None:
    with of(m).data_disk.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"newer")


def replace_disk(m: tiny.Machine) -> None:
    copy = of(m).data_disk.with_name("copy")
    subprocess.run(["cp", "--sparse=always", "--preserve=all", of(m).data_disk, copy], check=True)
    copy.replace(of(m).data_disk)


def foreign_memory(m: tiny.Machine) -> None:
    """Another memory, whole by its record: QEMU itself has to refuse it."""
    record = saved_state.load(of(m))
    memory = saved_state.new_memory(of(m))
    os.write(memory.fd, of(m).memory.read_bytes()[: 3 * 1024 * 1024])
    told = {name: getattr(record, name) for name in record.__struct_fields__ if name not in {"size", "pieces"}}
    saved_state.keep(of(m), memory, **told)


DAMAGES: dict[Callable[[tiny.Machine], None], str] = {
    cut_memory: "the saved state is damaged",
    flip_memory: "the saved state is damaged",
    lose_memory: "memory.suspended cannot be read",
    cut_record: "suspended.json is damaged",
    other_version: "written by another version of ovm",
    write_disk: "changed since it was suspended: the data disk",
    replace_disk: "changed since it was suspended: the data disk",
    foreign_memory: "the guest could not resume",
}


@under.QEMU_ALONE
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
async def test_what_does_not_fit_is_never_gone_on_from(
    machines: tiny.Machines, damage: Callable[[tiny.Machine], None]
) -> None:
    """A saved state that is damaged or does not match is not resumed; the machine boots and reports why."""
    m = await asleep(machines)
    damage(m)
    await m.ovm.start()
    assert DAMAGES[damage] in m.ovm.info.not_resumed
    assert m.events == ["ready"]
    assert m.transitions[-2:] == ["Starting", "Running"]
    assert await kept(m) == ""
    assert is_kept(m) == [False, False]
    await m.ovm.stop()
    await m.ovm.start()
    assert m.ovm.info.not_resumed == ""


@under.QEMU_ALONE
async def test_another_machine_is_told_by_what_differs(machines: tiny.Machines) -> None:
    """The reason for not resuming names what differs, and nothing else."""
    await asleep(machines)
    other = await machines("m", memory_mib=320, data_disk_mib=300)
    await other.ovm.start()
    why = other.ovm.info.not_resumed
    assert "the virtual machine" in why
    assert "the data disk" in why
    assert "the rootfs" not in why


@under.QEMU_ALONE
async def test_a_taken_port_is_told_and_no_more(machines: tiny.Machines) -> None:
    """A port that was taken meanwhile is reported, and the machine resumes."""
    m = await machines()
    await m.ovm.start()
    await m.tell("echo precious >/kept")
    port = (await m.ovm.export_port(0, 22)).host_port
    ssh_port = m.ovm.info.ssh_port
    await m.ovm.suspend()
    with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", ssh_port)):
        await m.ovm.start()
        assert [type(error) for error in m.errors] == [ovm.PortError]
        assert m.ovm.ports() == ()
        assert m.ovm.info.ssh_port != ssh_port
        assert await kept(m) == "precious"


@under.QEMU_ALONE
async def test_a_disk_that_is_too_small_is_told_and_nothing_lost(machines: tiny.Machines) -> None:
    """A suspend without room fails, and the machine runs on."""
    m = await machines()
    directory = m.ovm.options.target_dir
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "mode=0700,size=60m", "tmpfs", directory], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted: {made.stderr.decode().strip()}")
    try:
        m = await machines()
        await m.ovm.start()
        await m.tell("echo precious >/kept; dd if=/dev/urandom of=/ballast bs=1M count=50 2>/dev/null")
        with pytest.raises(ovm.SpaceError, match="no room for the machine's saved state"):
            await m.ovm.suspend()
        assert m.state == "Running"
        assert await kept(m) == "precious"
        assert is_kept(m) == [False, False]
        await m.tell("rm /ballast; dd if=/dev/zero of=/zeros bs=1M count=60; rm /zeros")
        await m.ovm.stop()
        assert await machines.leftovers() == []
    finally:
        await m.ovm.stop(force=True)
        subprocess.run(["umount", directory], check=True)


@under.QEMU_ALONE
async def test_a_stop_meanwhile_wins(machines: tiny.Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop during a suspend shuts the guest down and leaves no saved state."""
    m = await machines()
    await m.ovm.start()
    session = m.ovm._context.session
    assert session is not None
    saving, never = asyncio.Event(), asyncio.Event()
    save = type(session.vm).save

    async def slowly(vm: object, memory: int, *, timeout_s: float) -> None:
        await save(vm, memory, timeout_s=timeout_s)  # type: ignore[arg-type]
        saving.set()
        await never.wait()

    monkeypatch.setattr(type(session.vm), "save", slowly)
    suspending = asyncio.create_task(m.ovm.suspend())
    await saving.wait()
    assert m.state == "Saving"
    with pytest.raises(ovm.StateError, match="saving"):
        await m.ovm.export_port(0, 22)
    await m.ovm.stop()
    with pytest.raises(ovm.StateError, match="stopped meanwhile"):
        await suspending
    assert "the power button was pressed" in m.console()
    assert is_kept(m) == [False, False]
    assert await machines.leftovers() == []


@under.QEMU_ALONE
async def test_a_caller_that_goes_away_does_not_end_it(machines: tiny.Machines) -> None:
    """A suspend is finished although its caller was cancelled."""
    m = await machines()
    await m.ovm.start()
    suspending = asyncio.create_task(m.ovm.suspend())
    await m.until(state="Saving")
    suspending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await suspending
    await m.ovm.wait_closed()
    assert is_kept(m) == [True, True]


@under.QEMU_ALONE
async def test_a_cancelled_start_keeps_what_it_has_not_used(machines: tiny.Machines) -> None:
    """A start that is cancelled before it has used the saved state keeps it."""
    m = await asleep(machines)
    starting = m.start_soon()
    await m.until_step("hypervisor")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert m.state == "Stopped"
    assert await machines.leftovers() == []
    if is_kept(m) == [True, True]:  # the cancellation may come an instant after its use
        await m.ovm.start()
        assert await kept(m) == "precious"


@under.QEMU_ALONE
async def test_a_hypervisor_that_dies_meanwhile_is_told(machines: tiny.Machines) -> None:
    """A hypervisor that dies during a suspend is reported as an error."""
    m = await machines()
    await m.ovm.start()
    pid = m.helper("qemu")
    os.kill(pid, signal.SIGSTOP)
    suspending = asyncio.create_task(m.ovm.suspend())
    await m.until(state="Saving")
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ovm.OVMError):
        await suspending
    await m.ovm.wait_closed()
    assert [type(error) for error in m.errors] == [ovm.HelperExited]
    assert is_kept(m) == [False, False]
    await m.ovm.start()
    assert m.ovm.info.not_resumed == ""


@under.QEMU_ALONE
@pytest.mark.parametrize("sooner_ms", [0, 30, 60, 120])
async def test_a_killed_manager_leaves_all_or_nothing(machines: tiny.Machines, sooner_ms: int) -> None:
    """In the midst of saving; what is there afterwards is a memory to go on from, or a guest that boots."""
    options = json.dumps(machines.options())
    process = await asyncio.create_subprocess_exec(
        sys.executable, MANAGER, options, stdin=DEVNULL, stdout=PIPE, process_group=0
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            assert await process.stdout.readline() == b"suspending\n"
        await asyncio.sleep(sooner_ms / 1000)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
    m = await machines()
    whole = of(m).suspended.exists()
    await m.ovm.start()
    assert (await kept(m) == "precious") == whole
    assert m.ovm.info.not_resumed == ""
    assert is_kept(m) == [False, False]


@under.VFKIT_ALONE
async def test_vfkit_cannot(machines: tiny.Machines) -> None:
    """vfkit cannot suspend a machine, and the error reports it."""
    m = await machines()
    await m.ovm.start()
    with pytest.raises(ovm.UnsupportedError, match="crc-org/vfkit#449"):
        await m.ovm.suspend()
    assert m.state == "Running"
