"""Starts that fail: each with its own error, with evidence, and with nothing left behind."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import ovm
import processes
import tiny
import under
from ovm.model.options import SSH_PORT_FIRST

pytestmark = pytest.mark.tiny


async def failure(m: tiny.Machine, machines: tiny.Machines, **how: Any) -> ovm.OVMError:
    """The error of a start, which must have told of it and left nothing."""
    with pytest.raises(ovm.OVMError) as caught:
        await m.ovm.start(**how)
    assert m.events == ["error", "close"]
    assert m.errors == [caught.value]
    assert m.state == "Stopped"
    assert await machines.leftovers() == []
    m.events.clear(), m.errors.clear()
    return caught.value


def script(path: Path, body: str) -> Path:
    """A program that tells gvproxy's and QEMU's version, and otherwise does ``body``."""
    path.write_text(
        "#!/bin/sh\n"
        'case $1 in -version) echo "gvproxy version v0.8.9"; exit ;;'
        ' --version) echo "QEMU emulator version 7.2.0"; exit ;; esac\n' + body
    )
    path.chmod(0o755)
    return path


async def test_the_guest_is_never_ready_and_a_later_start_succeeds(machines: tiny.Machines) -> None:
    """A guest that never becomes ready fails the start, and a later start succeeds."""
    m = await machines("m", "never", "tick")
    error = await failure(m, machines, timeout_s=8)
    assert isinstance(error, ovm.NotReadyError)
    assert (error.message, error.stage) == ("not ready within 8 s", "boot")
    assert error.log_tail
    assert str(m.ovm.options.log_dir / "console.log") in error.hint
    again = await machines()
    async with again.ovm:
        assert again.events == ["ready"]


async def test_the_guest_says_that_it_cannot_go_on(machines: tiny.Machines) -> None:
    """A guest that reports a fatal failure fails the start with it."""
    m = await machines("m", "fatal=data-damaged")
    error = await failure(m, machines)
    assert isinstance(error, ovm.GuestRefused)
    assert error.message == "the guest cannot boot: tiny cannot go on"
    assert error.stage == "data-damaged"
    assert "btrfs restore" in error.hint


async def test_the_guests_last_words_count_however_late_they_are_heard(machines: tiny.Machines) -> None:
    """The failure that a guest reported is raised although the guest has ended meanwhile."""
    m = await machines("m", "fatal=data-foreign")

    program = "qemu-system" if machines.hypervisor == "qemu" else "target/vfkit"
    done = m.ovm._context.step_done

    def step(name: str) -> None:
        done(name)
        if name == "hypervisor":  # doze while the guest speaks, powers off, and hypervisor and gvproxy end
            (pid,) = [pid for pid in processes.holders(machines.root) if program in first_word(pid)]
            deadline = time.monotonic() + 120
            while program in processes.command(pid):
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def first_word(pid: int) -> str:
        return processes.command(pid).partition(" ")[0]

    m.ovm._context.step_done = step  # type: ignore[method-assign]
    error = await failure(m, machines)
    assert isinstance(error, ovm.GuestRefused)
    assert error.stage == "data-foreign"


@pytest.mark.parametrize(
    ("word", "message", "console"),
    [
        ("panic", "the guest reset itself before it was ready: kernel panic, sysrq triggered crash", "Kernel Offset"),
        ("reset", "the guest reset itself before it was ready", "tiny: booted"),
        ("off", "the guest powered itself off before it was ready", "Power down"),
    ],
)
async def test_the_guest_falls_while_it_boots(machines: tiny.Machines, word: str, message: str, console: str) -> None:
    """A guest that crashes while it boots fails the start, with its console as evidence."""
    m = await machines("m", word)
    error = await failure(m, machines)
    assert isinstance(error, ovm.StartError)
    assert (error.message, error.stage) == (message, "boot")
    if word == "off" and machines.hypervisor == "vfkit":
        console = "tiny: booted"  # its console is a virtio device, which the kernel shuts down before its last words
    assert console in "\n".join(error.log_tail)
    assert "console.log" in error.hint


@under.QEMU_ALONE
async def test_qemu_that_ends_at_once(machines: tiny.Machines) -> None:
    """A QEMU that ends at once fails the start, with its log as evidence."""
    qemu = script(machines.root / "qemu", "echo 'no such machine' >&2; exit 3\n")
    m = await machines("m", qemu=str(qemu), accelerator="tcg")
    error = await failure(m, machines)
    assert isinstance(error, ovm.HelperExited)
    assert (error.message, error.stage) == ("qemu ended unexpectedly", "hypervisor")
    assert error.exit_reason == "exit status 3"
    assert error.log_tail == ("no such machine",)
    assert "qemu.log" in error.hint


@under.QEMU_ALONE
async def test_qemu_that_never_answers(machines: tiny.Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that never answers fails the start at its deadline."""
    monkeypatch.setattr("ovm.hypervisors.qemu.QMP_START_S", 1.0)
    qemu = script(machines.root / "qemu", "echo thinking; exec sleep 1000\n")
    m = await machines("m", qemu=str(qemu), accelerator="tcg")
    error = await failure(m, machines)
    assert isinstance(error, ovm.NotReadyError)
    assert error.stage == "hypervisor"
    assert error.log_tail == ("thinking",)


async def test_gvproxy_that_ends_at_once(machines: tiny.Machines) -> None:
    """A gvproxy that ends at once fails the start, with its log as evidence."""
    machines.gvproxy = script(machines.root / "gvproxy", "echo 'cannot listen'; exit 0\n")
    error = await failure(await machines(), machines)
    assert isinstance(error, ovm.HelperExited)
    assert (error.message, error.stage) == ("gvproxy ended unexpectedly", "network")
    assert error.exit_reason == "exit status 0"
    assert error.log_tail == ("cannot listen",)


async def test_gvproxy_that_never_answers(machines: tiny.Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gvproxy that never answers fails the start at its deadline."""
    monkeypatch.setattr("ovm.network.gvproxy.API_START_S", 1.0)
    machines.gvproxy = script(machines.root / "gvproxy", "trap '' TERM\nwhile :; do sleep 0.2; done\n")
    monkeypatch.setattr("ovm.network.gvproxy.END_GRACE_S", 0.2)
    error = await failure(await machines(), machines)
    assert isinstance(error, ovm.NotReadyError)
    assert error.stage == "network"


@pytest.mark.parametrize("name", ["gvproxy", "kernel", "tiny.initrd"])
async def test_a_file_that_vanished_after_create(machines: tiny.Machines, name: str) -> None:
    """A file that was removed after create() fails the start, and the error names it."""
    m = await machines()
    (m.ovm.options.target_dir / name).unlink()
    error = await failure(m, machines)
    assert isinstance(error, ovm.FileError)
    assert error.message == f"{m.ovm.options.target_dir / name} is missing"
    assert "reset_path" in error.hint
    await m.ovm.reset_path()
    starting = m.start_soon()
    await m.until_step("hypervisor")
    await m.ovm.stop()
    with pytest.raises(ovm.StartError):
        await starting


async def test_a_taken_ssh_port_is_passed_over(machines: tiny.Machines) -> None:
    """A start picks another ssh port when the first one is taken."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for port in range(SSH_PORT_FIRST, SSH_PORT_FIRST + 50):  # the first that is free now would have been taken
            try:
                taken.bind(("127.0.0.1", port))
            except OSError:
                continue
            break
        taken.listen()
        m = await machines()
        async with m.ovm:
            assert m.ovm.info.ssh_port > port


async def test_directories_that_vanished_are_made_again(machines: tiny.Machines) -> None:
    """A start recreates directories that were removed."""
    m = await machines()
    for directory in (m.ovm.options.socket_dir, m.ovm.options.log_dir):
        shutil.rmtree(directory)
    starting = m.start_soon()
    await m.until_step("hypervisor")
    assert m.ovm.options.socket_dir.stat().st_mode & 0o777 == 0o700
    await m.ovm.stop()
    with pytest.raises(ovm.StartError):
        await starting


async def test_a_socket_directory_that_became_unusable(machines: tiny.Machines) -> None:
    """A socket directory that cannot be used fails the start, and the error names it."""
    m = await machines()
    directory = m.ovm.options.socket_dir
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    directory.write_text("a file now")
    error = await failure(m, machines)
    assert isinstance(error, ovm.FileError)
    assert str(directory) in error.message


async def test_a_socket_directory_is_made_private_again(machines: tiny.Machines) -> None:
    """One that others can look into is closed; one that they can write to is refused, for they may have done so."""
    m = await machines()
    m.ovm.options.socket_dir.chmod(0o777)
    assert isinstance(await failure(m, machines), ovm.UntrustedError)
    for mode in (0o500, 0o755):
        m.ovm.options.socket_dir.chmod(mode)
        starting = m.start_soon()
        await m.until_step("network")
        assert m.ovm.options.socket_dir.stat().st_mode & 0o777 == 0o700
        await m.ovm.stop()
        with pytest.raises(ovm.StartError):
            await starting
