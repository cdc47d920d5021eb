"""Each step of a start made to fail from outside: a typed error, nothing left, and the next start is as any other."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ovm
import processes
import tiny
import under

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(sys.platform != "linux", reason="it looks for helpers in /proc"),
]

Fault = Callable[[tiny.Machine], object]
STEPS = ("guard", "network", "hypervisor")


def helper(m: tiny.Machine, name: str) -> int:
    """The process id of a helper of its start that is under way; all of them hold its lock."""
    for _ in range(500):
        holders = processes.holders(m.ovm.options.target_dir)
        found = [pid for pid in holders if name in processes.command(pid).partition(" ")[0]]
        if len(found) == 1:
            return found[0]
        time.sleep(0.01)  # its child goes by its name until it has become a program of its own
    pytest.fail(f"{len(found)} processes are {name}")


async def fails(
    machines: tiny.Machines, m: tiny.Machine, *, step: str = "", fault: Fault | None = None
) -> ovm.OVMError:
    """The error of a start in which ``fault`` comes right behind ``step``; it has left nothing."""
    done = m.ovm._context.step_done

    def strike(name: str) -> None:
        done(name)
        if name == step and fault is not None:
            fault(m)

    m.ovm._context.step_done = strike  # type: ignore[method-assign]
    with pytest.raises(ovm.OVMError) as caught:
        await m.ovm.start()
    m.ovm._context.step_done = done  # type: ignore[method-assign]
    assert not str(caught.value).startswith("internal error"), caught.value
    assert m.events == ["error", "close"]
    assert m.errors == [caught.value]
    assert m.state == "Stopped"
    assert await machines.leftovers() == []
    return caught.value


async def starts(machines: tiny.Machines, m: tiny.Machine) -> None:
    """The next start gets to where the guest boots; it needs no more of the host."""
    m.events.clear()
    starting = m.start_soon()
    await m.until_step("hypervisor")
    await m.ovm.stop()
    with pytest.raises(ovm.StartError, match="stopped before it was ready"):
        await starting
    assert m.events == ["close"]
    assert await machines.leftovers() == []


def kill(name: str) -> Fault:
    return lambda m: os.kill(helper(m, name), signal.SIGKILL)


def take_socket_dir(m: tiny.Machine) -> None:
    shutil.rmtree(m.ovm.options.socket_dir)


@pytest.mark.parametrize("step", STEPS[1:])
async def test_gvproxy_is_killed_behind_a_step(machines: tiny.Machines, step: str) -> None:
    """A gvproxy that is killed after a step fails the start, and a later start succeeds."""
    m = await machines()
    error = await fails(machines, m, step=step, fault=kill("gvproxy"))
    assert isinstance(error, ovm.StartError)
    assert "gvproxy" in str(error) or "net.sock: connect: connection refused" in str(error)  # which is what vfkit sees
    await starts(machines, m)


async def test_the_hypervisor_is_killed_when_it_has_just_begun(machines: tiny.Machines) -> None:
    """A hypervisor that is killed just after its start fails the start."""
    m = await machines()
    program = "qemu-system" if machines.hypervisor == "qemu" else "target/vfkit"
    error = await fails(machines, m, step="hypervisor", fault=kill(program))
    assert isinstance(error, ovm.HelperExited)
    assert (error.message, error.exit_reason) == (f"{machines.hypervisor} ended unexpectedly", "killed by SIGKILL")
    await starts(machines, m)


@under.QEMU_ALONE
@pytest.mark.parametrize("step", STEPS[:-1])
async def test_the_socket_directory_is_taken_away_behind_a_step(machines: tiny.Machines, step: str) -> None:
    """A socket directory that is removed after a step fails the start, and a later start succeeds."""
    m = await machines()
    error = await fails(machines, m, step=step, fault=take_socket_dir)
    assert isinstance(error, ovm.StartError | ovm.HelperError)
    assert "No such file or directory" in str(error)
    await starts(machines, m)


@under.QEMU_ALONE
@pytest.mark.parametrize("name", ["guard.log", "gvproxy.log", "console.log", "qemu.log"])
async def test_a_log_that_cannot_be_written(machines: tiny.Machines, name: str) -> None:
    """A log that cannot be written fails the start, and the error names its program."""
    m = await machines()
    for generation in (name, name.replace(".", ".2."), name.replace(".", ".3.")):
        (m.ovm.options.log_dir / generation / "inside").mkdir(parents=True)
    error = await fails(machines, m)
    assert name.partition(".")[0] in str(error)
    for path in m.ovm.options.log_dir.glob(f"{name.partition('.')[0]}*"):
        shutil.rmtree(path)
    await starts(machines, m)


@under.QEMU_ALONE
@pytest.mark.parametrize("content", ["", "#!/nonexistent/shell\n", "no program"])
async def test_a_gvproxy_that_cannot_be_executed(machines: tiny.Machines, content: str) -> None:
    """A gvproxy that cannot be executed fails the start, and the error names it."""
    m = await machines()
    program = m.ovm.options.target_dir / "gvproxy"
    if content:
        program.write_text(content)
    else:
        program.chmod(0o644)
    error = await fails(machines, m)
    assert isinstance(error, ovm.HelperError | ovm.HelperExited)
    assert "gvproxy" in str(error)
    await m.ovm.reset_path()
    await starts(machines, m)


@under.QEMU_ALONE
async def test_the_data_disk_is_gone(machines: tiny.Machines) -> None:
    """Nobody makes an empty one in its place."""
    m = await machines()
    disk = m.ovm.options.target_dir / "data.img"
    away = disk.rename(disk.with_name("away"))
    error = await fails(machines, m)
    assert "data.img" in str(error)
    assert not disk.exists()
    away.rename(disk)
    await starts(machines, m)


@contextlib.contextmanager
def small(directory: Path, *options: str) -> Iterator[None]:
    """A file system of its own for ``directory``, which stays empty below it."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(["mode=0700", *options]), "tmpfs", directory],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"no file system can be mounted: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def fill(path: Path) -> None:
    """Take all room that there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@under.QEMU_ALONE
async def test_there_is_no_room_for_the_boot_configuration(machines: tiny.Machines) -> None:
    """A start without room for the boot configuration fails, and succeeds once there is room."""
    m = await machines()
    directory = m.ovm.options.socket_dir
    with small(directory, "size=1m"):
        error = await fails(machines, m)
        assert "No space left on device" in str(error)
        subprocess.run(["mount", "-o", "remount,size=64m", directory], check=True)
        await starts(machines, m)
    await starts(machines, m)


@under.QEMU_ALONE
async def test_there_is_no_room_for_another_log(machines: tiny.Machines) -> None:
    """A start without room for another log fails, and succeeds once there is room."""
    m = await machines()
    directory = m.ovm.options.log_dir
    with small(directory, "nr_inodes=3"):  # the root and the lock are two of them
        error = await fails(machines, m)
        assert "No space left on device" in str(error)
        subprocess.run(["mount", "-o", "remount,nr_inodes=100", directory], check=True)
        await starts(machines, m)


@under.QEMU_ALONE
async def test_logs_that_cannot_grow_stop_no_machine(machines: tiny.Machines) -> None:
    """What would be told is lost; the machine is what counts."""
    m = await machines()
    with small(m.ovm.options.log_dir, "size=64k"):
        fill(m.ovm.options.log_dir / "ballast")
        async with m.ovm:
            assert m.events == ["ready"]
        assert m.events == ["ready", "close"]
        assert await machines.leftovers() == []
