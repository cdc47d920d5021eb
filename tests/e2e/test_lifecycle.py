"""A machine's life: starts, stops, pauses, reboots, and what it tells meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

import ovm
import tiny

pytestmark = pytest.mark.tiny


async def test_a_start_and_a_stop(machines: tiny.Machines) -> None:
    """A machine starts, is usable and stops, and leaves nothing."""
    m = await machines()
    assert m.state == "Stopped"
    with pytest.raises(ovm.StateError, match="start"):
        _ = m.ovm.info
    starting = m.start_soon()
    await m.until(state="Starting")
    with pytest.raises(ovm.StateError, match="already starting"):
        await m.ovm.start()
    assert (await m.ovm.vm_state()).state == "VirtualMachineStateStarting"
    await starting

    assert (m.events, m.states) == (["ready"], ["Running"])
    assert m.ovm.info.accelerator in {"kvm", "tcg", "hvf"}
    assert m.ovm.info.podman_port is None
    names = [stage.name for stage in m.ovm.info.timings]
    assert names == ["guard", "network", "hypervisor", "guest: initrd", "guest: ready", "guest", "ready"]
    told = await m.ovm.vm_state()
    assert told == ovm.StateInfo(
        state=ovm.VMState.RUNNING, can_pause=True, can_resume=False, can_stop=True, can_hard_stop=True
    )
    assert "Linux" in await m.tell("cat /proc/version")
    with pytest.raises(ovm.StateError, match="already running"):
        await m.ovm.start()
    with pytest.raises(ovm.StateError, match="running"):
        await m.ovm.reset_path()

    stopping = asyncio.create_task(m.ovm.stop())
    await m.until(state="Stopping")
    assert (await m.ovm.vm_state()).can_pause is False
    await stopping
    assert (m.events, m.states) == (["ready", "close"], ["Running", "Stopped"])
    assert "the power button was pressed" in m.console()
    assert await machines.leftovers() == []
    await m.ovm.stop()  # fine, and tells nothing again
    assert m.events == ["ready", "close"]


async def test_three_starts_on_one_object_keep_three_logs(machines: tiny.Machines) -> None:
    """The logs of the last three starts are kept, and files of others in that directory."""
    m = await machines()
    logs = m.ovm.options.log_dir
    kept = {f"{name}{n}.log" for name in ("gvproxy", machines.hypervisor, "guard", "console") for n in ("", ".2", ".3")}
    (logs / "notes.txt").write_text("not ours")
    for _ in range(2):
        async with m.ovm:
            assert (await m.ovm.vm_state()).state == "VirtualMachineStateRunning"
        assert await machines.leftovers() == []
    for _ in range(2):  # two more need no guest
        starting = m.start_soon()
        await m.until_step("guard")
        starting.cancel()
        await asyncio.wait({starting})
    assert {path.name for path in logs.iterdir()} == kept | {"notes.txt", "ovm.lock"}
    assert "tiny: booted" in (logs / "console.3.log").read_text()
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in logs.glob("*.log"))


async def test_pause_and_resume(machines: tiny.Machines) -> None:
    """A paused guest does nothing, and a resumed one runs again."""
    m = await machines("m", "tick")
    async with m.ovm:
        await m.ovm.vm_pause()
        assert (await m.ovm.vm_state()).state == "VirtualMachineStatePaused"
        await m.ovm.vm_pause()  # fine
        stood = m.console()
        await asyncio.sleep(1)  # measured: the time in which a paused guest, which ticks, does nothing
        assert m.console() == stood
        with pytest.raises(ovm.StateError, match="vm_resume"):
            await m.ovm.exec(["true"])

        await m.ovm.vm_resume()
        await m.ovm.vm_resume()  # fine
        assert (await m.ovm.vm_state()).state == "VirtualMachineStateRunning"
        async with asyncio.timeout(60):
            while len(m.console()) <= len(stood):
                await asyncio.sleep(0.05)

        # both at once: whatever the order, each of them holds when it returns
        await asyncio.gather(m.ovm.vm_pause(), m.ovm.vm_resume(), m.ovm.vm_pause(), m.ovm.vm_pause())
        assert m.state == "Paused"
    pause, resume = ["Pausing", "Paused"], ["Resuming", "Running"]
    assert m.transitions == ["Starting", "Running", *pause, *resume, *pause, *resume, *pause, "Stopping", "Stopped"]
    assert m.events == ["ready", "vmPause", "vmResume", "vmPause", "vmResume", "vmPause", "close"]
    assert m.console().count("the power button was pressed") == 1, "a paused guest was not shut down"


async def test_a_guest_that_reboots_is_ready_twice(machines: tiny.Machines) -> None:
    """A guest that reboots becomes ready again."""
    m = await machines()
    async with m.ovm:
        for round_ in (2, 3):
            await m.order("busybox reboot -f" if round_ == 2 else "echo c >/proc/sysrq-trigger")
            await m.until(state="Starting", count=round_)
            with pytest.raises(ovm.StateError):
                await m.ovm.vm_pause()
            await m.until(event="ready", count=round_)
            assert m.state == "Running"
            assert (await m.ovm.vm_state()).state == "VirtualMachineStateRunning"
            assert "Linux" in await m.tell("cat /proc/version")
    assert m.events == ["ready", "ready", "error", "ready", "close"]  # a panic is no reboot like any other
    assert m.states == ["Running", "Running", "Starting", "Running", "Stopped"]


async def test_a_stop_while_the_guest_reboots(machines: tiny.Machines) -> None:
    """A stop during a reboot of the guest ends the machine."""
    m = await machines()
    await m.ovm.start()
    await m.order("busybox reboot -f")
    await m.until(state="Starting", count=2)
    await m.ovm.stop(force=True)
    assert m.events == ["ready", "close"]


async def test_a_guest_that_falls_again_and_again_is_an_error(machines: tiny.Machines) -> None:
    """A guest that crashes again while it reboots ends the machine with an error that has the panic's cause."""
    m = await machines()
    await m.ovm.start()
    await m.tell("echo panic | dd of=/dev/vdb conv=notrunc; busybox sync")
    await m.order("busybox reboot -f")
    await m.until(event="close")
    assert m.events == ["ready", "error", "close"]
    assert m.errors[0].message == "the guest reset itself before it was ready: kernel panic, sysrq triggered crash"
    assert m.errors[0].stage == "boot"


async def test_a_guest_that_powers_itself_off_closes_without_an_error(machines: tiny.Machines) -> None:
    """A guest that powers itself off closes the machine without an error."""
    m = await machines()
    await m.ovm.start()
    await m.order("poweroff -f")
    await m.until(event="close")
    assert (m.events, m.state) == (["ready", "close"], "Stopped")
    assert await machines.leftovers() == []
    await m.ovm.start()
    await m.ovm.stop(force=True)
    assert m.events == ["ready", "close"] * 2


@pytest.mark.parametrize("name", ["hypervisor", "guard"])
async def test_a_helper_that_is_killed_is_named(machines: tiny.Machines, name: str) -> None:
    """The error names the helper process that was killed."""
    m = await machines()
    name = machines.hypervisor if name == "hypervisor" else name
    await m.ovm.start()
    os.kill(m.helper(name), signal.SIGKILL)
    await m.until(event="close")
    assert m.events == ["ready", "error", "close"]
    assert m.states[-1] == "Stopped"
    (error,) = m.errors
    assert isinstance(error, ovm.HelperExited)
    assert error.message.startswith(f"{name} ")
    assert (error.exit_reason, error.stage) == ("killed by SIGKILL", "running")
    assert str(m.ovm.options.log_dir / f"{name}.log") in error.hint
    assert await machines.leftovers() == []


async def test_the_hypervisor_killed_while_paused(machines: tiny.Machines) -> None:
    """A hypervisor that is killed while the machine is paused ends the machine with an error."""
    m = await machines()
    await m.ovm.start()
    await m.ovm.vm_pause()
    os.kill(m.helper(machines.hypervisor), signal.SIGKILL)
    await m.until(event="close")
    assert m.events == ["ready", "vmPause", "error", "close"]
    with pytest.raises(ovm.StateError, match="stopped"):
        await m.ovm.vm_resume()


async def test_what_a_guest_says_cannot_hurt(machines: tiny.Machines, caplog: pytest.LogCaptureFixture) -> None:
    """Hostile messages of a guest are cut, and their control characters never reach the log."""
    m = await machines("m", "hostile", "warn=\\033]0;owned\\007careful")
    async with m.ovm:
        assert m.events == ["ready"]
        assert len(m.ovm.info.timings) < 100
    said = [record.getMessage() for record in caplog.records if "careful" in record.getMessage()]
    assert len(said) == 1
    assert "\033" not in said[0]
    assert all(len(record.getMessage()) < 5000 for record in caplog.records)


async def test_two_machines_side_by_side(machines: tiny.Machines) -> None:
    """Two machines run at the same time without disturbing each other."""
    one, two = await machines("one"), await machines("two")
    await asyncio.gather(one.ovm.start(), two.ovm.start())
    assert one.ovm.info.ssh_port != two.ovm.info.ssh_port
    await asyncio.gather(one.tell("hostname one"), two.tell("hostname two"))
    await one.ovm.stop()
    assert await two.tell("hostname") == "two\n"
    assert (await two.ovm.vm_state()).state == "VirtualMachineStateRunning"
    await two.ovm.stop()
