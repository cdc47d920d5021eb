"""What dies under a running machine and is made good without its containers noticing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

import ovm
import processes
import soak
import under
from full import BUSYBOX_IMAGE, MachineOptions, Podman, eventually, fetch, running
from ovm.network.host_ports import free_port

pytestmark = [pytest.mark.full, under.QEMU_ALONE]

BACK_S = 3.0
"""The promise; measured from the kill until the port of a container answers."""
SERVE = "echo hello > /tmp/hello; exec httpd -f -p 80 -h /tmp"


def gvproxy(vm: ovm.OVM) -> int:
    assert vm._context.session is not None
    return vm._context.session.network.child.pid


@pytest.mark.soak
async def test_gvproxy_is_killed_under_load(vm: ovm.OVM, podman: Podman) -> None:
    """The network is back, forwards are the same, and no container was restarted."""
    port = free_port("tcp", "127.0.0.1", 0)
    assert port
    healths: list[ovm.Health] = []
    forget = vm.on("health", healths.append)
    rounds, took = soak.times(20), []
    async with running(podman, "-p", f"{port}:80", BUSYBOX_IMAGE, "sh", "-c", SERVE) as container:
        exported = await vm.export_port(0, port)

        async def served() -> bool:
            return await fetch(port) == "hello" == await fetch(exported.host_port)

        async def load() -> None:
            while True:
                await asyncio.gather(fetch(port), fetch(exported.host_port), podman("ps", check=False))

        await eventually(served)
        inspect = ("inspect", "--format", "{{.State.StartedAt}} {{.State.Pid}} {{.RestartCount}}", container)
        before, open_before, info = await podman(*inspect), vm.ports(), vm.info
        loading = [asyncio.create_task(load()) for _ in range(2)]
        try:
            for _ in range(rounds):
                await asyncio.sleep(soak.random("gvproxy").uniform(0.2, 1.0))
                killed, at = gvproxy(vm), time.monotonic()
                os.kill(killed, signal.SIGKILL)
                await eventually(served, timeout_s=60, interval_s=0.02)
                took.append(time.monotonic() - at)
                assert gvproxy(vm) != killed
                await eventually(lambda: is_well(vm))
        finally:
            for task in loading:
                task.cancel()
            await asyncio.wait(loading)
        assert (await podman(*inspect)).out == before.out
        assert vm.ports() == open_before
        assert (vm.info.ssh_port, vm.info.podman_port) == (info.ssh_port, info.podman_port)
        assert (await vm.exec(["echo", "there"])).text == "there"
        await vm.unexport_port(exported.host_port)
    forget()
    assert len([health for health in healths if any("gvproxy" in words for words in health.problems)]) == rounds
    assert vm.info.health.ok
    assert vm.state is ovm.VMState.RUNNING
    late = [seconds for seconds in took if seconds > BACK_S]
    soak.row(
        "gvproxy killed under load: container's port answers again",
        f"{rounds} of {rounds} within {BACK_S:g} s",
        f"{rounds - len(late)} of {rounds}; median {sorted(took)[rounds // 2]:.2f} s, worst {max(took):.2f} s",
    )


async def is_well(vm: ovm.OVM) -> bool:
    return vm.info.health.ok


async def test_a_container_that_starts_after_it_is_published(vm: ovm.OVM, podman: Podman) -> None:
    """The way by which podman announces ports is brought back too."""
    os.kill(gvproxy(vm), signal.SIGKILL)
    port = free_port("tcp", "127.0.0.1", 0)

    async def answers() -> bool:
        return (await podman("ps", check=False)).status == 0

    await eventually(answers)
    async with running(podman, "-p", f"{port}:80", BUSYBOX_IMAGE, "sh", "-c", SERVE):

        async def served() -> bool:
            return await fetch(port or 0) == "hello"

        await eventually(served)
    assert (await vm.check_health()).ok


async def test_a_port_that_was_taken_meanwhile_is_told(vm: ovm.OVM) -> None:
    """It is closed then, and the rest is open."""
    errors: list[ovm.OVMError] = []
    forget = vm.on("error", errors.append)
    lost, kept = await vm.export_port(0, 22), await vm.export_port(0, 22)
    pid = gvproxy(vm)
    assert vm._context.session is not None
    network = vm._context.session.network
    thief: asyncio.Server | None = None
    begin = network._process.begin

    async def taken_first() -> None:
        nonlocal thief
        thief = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", lost.host_port)
        await begin()

    network._process.begin = taken_first  # type: ignore[method-assign]
    try:
        os.kill(pid, signal.SIGKILL)

        async def told() -> bool:
            return bool(errors)

        await eventually(told)
    finally:
        network._process.begin = begin  # type: ignore[method-assign]
        forget()
        if thief is not None:
            thief.close()
    assert isinstance(errors[0], ovm.PortError)
    assert str(lost.host_port) in errors[0].message
    assert lost not in vm.ports()
    assert kept in vm.ports()
    await vm.unexport_port(kept.host_port)


async def test_a_gvproxy_that_hangs_is_replaced(vm: ovm.OVM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing answers by way of it: looks find that out, and it is given up."""
    monkeypatch.setattr("ovm.machine.health.TIMEOUT_S", 2.0)
    hung = gvproxy(vm)
    await asyncio.to_thread(processes.freeze, hung)
    vm._context.monitor.look_soon()  # type: ignore[union-attr]  # as the host's wake does

    async def replaced() -> bool:
        return gvproxy(vm) != hung and vm.info.health.ok

    await eventually(replaced, timeout_s=120)
    assert (await vm.exec(["true"])).exit_status == 0


async def test_the_guests_health_is_told(vm: ovm.OVM) -> None:
    """Podman answers, and what the data disk holds is known."""
    health = await vm.check_health()
    assert health.ok
    assert vm.info.health == health
    assert health.checked_at is not None
    assert abs(health.checked_at - time.time()) < 60
    assert 0 < health.data_free_bytes < health.data_size_bytes <= 8 << 30  # type: ignore[operator]
    assert health.host_free_bytes


async def test_a_dead_virtiofsd_is_named(options_for: MachineOptions, tmp_path: Path) -> None:
    """What containers have mounted is gone with it: the guest is shut down, and it is said why."""
    if os.geteuid() and not (shutil.which("virtiofsd") or Path("/usr/libexec/virtiofsd").exists()):
        pytest.skip("QEMU's own virtiofsd runs for root alone")
    machine = await under.create(options_for("virtiofsd"), mounts=[ovm.Mount(tmp_path)])
    errors: list[ovm.OVMError] = []
    closed = asyncio.Event()
    machine.on("error", errors.append)
    machine.on("close", closed.set)
    machine._context.stop.timeout_s = 10.0  # what the guest has mounted may well keep it from shutting down
    async with machine:
        assert machine._context.session is not None
        (virtiofsd,) = machine._context.session.vm.daemons
        os.kill(virtiofsd.pid, signal.SIGKILL)
        async with asyncio.timeout(120):
            await closed.wait()
    (error,) = errors
    assert isinstance(error, ovm.HelperExited)
    assert error.message.startswith("virtiofsd")
    assert error.exit_reason == "killed by SIGKILL"
    assert machine.state is ovm.VMState.STOPPED
