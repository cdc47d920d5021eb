"""Guests of the seed's time: told over vsock 1025, ready on 1026, their network over 1024."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

import core
import ovm
import tiny
import under
from full import BUSYBOX_IMAGE, Podman, busybox_tar, eventually, fetch

pytestmark = [pytest.mark.full, under.VFKIT_ALONE]

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def core_guest(image: Path, tmp_path_factory: pytest.TempPathFactory) -> tiny.Guest:
    """The files of a guest made to that contract."""
    return core.build(image, tmp_path_factory.mktemp("core"))


@pytest.fixture
def options(core_guest: tiny.Guest, gvproxy: Path, short_path: Path, hypervisor: str) -> dict[str, Any]:
    """Options of a machine of that guest."""
    assert hypervisor == "vfkit"
    origins = {"gvproxy": gvproxy, "vfkit": under.vfkit()}
    origins |= {name: getattr(core_guest, name) for name in ("kernel", "initrd", "rootfs")}
    return {
        "origin_path": origins,
        "versions": dict.fromkeys(origins, "1"),
        "target_dir": short_path / "target",
        "socket_dir": short_path / "socket",
        "log_dir": short_path / "log",
        "ssh_key_dir": short_path / "ssh",
        "guest": "ovm-core",
        "cpus": 2,
        "memory_mib": 1536,
        "data_disk_mib": 4096,
        "mounts": [],
    }


@pytest.fixture
async def machine(options: dict[str, Any], short_path: Path) -> AsyncIterator[ovm.OVM]:
    """One that runs, with a folder of the host's whose name wants quoting."""
    shared = short_path / "it's $(touch pwned) here"
    shared.mkdir()
    (shared / "from-host").write_text("hello\n")
    machine = await under.create(options, mounts=[ovm.Mount(shared)], timezone="Asia/Kolkata", hostname="seed")
    async with machine:
        yield machine


async def said(machine: ovm.OVM, *argv: str) -> str:
    result = await machine.exec(argv, timeout_s=60)
    assert result.exit_status == 0, result.stderr
    return result.text


async def test_it_is_what_was_asked_for(machine: ovm.OVM, tmp_path: Path) -> None:
    """Keys, name, zone and folders by the command; podman by its socket and a port; a clock; exported ports."""
    info = machine.info
    assert (await said(machine, "hostname")) == "seed"
    assert (await said(machine, "readlink", "/etc/localtime")) == "/usr/share/zoneinfo/Asia/Kolkata"
    (mount,) = machine.options.mounts
    assert (await said(machine, "cat", f"{mount.guest_path}/from-host")) == "hello"
    assert "pwned" not in await said(machine, "ls", "/", "/root")
    assert "tap0" in await said(machine, "ip", "link")

    assert info.podman_port is not None
    for transport, host in (
        (httpx2.AsyncHTTPTransport(uds=str(info.podman_socket)), "podman"),
        (None, f"127.0.0.1:{info.podman_port}"),
    ):
        async with httpx2.AsyncClient(transport=transport, trust_env=False, timeout=60) as client:
            assert (await client.get(f"http://{host}/libpod/_ping")).text == "OK"
    assert info.podman_socket.stat().st_mode & 0o777 == 0o600

    podman = Podman(machine, tmp_path)
    await podman("import", busybox_tar(tmp_path / "busybox.tar"), BUSYBOX_IMAGE)
    await podman(
        "run", "-d", "--name", "web", "--network", "host", BUSYBOX_IMAGE,
        "sh", "-c", "echo exported > /tmp/hello; exec httpd -f -p 8080 -h /tmp",
    )  # fmt: skip
    forward = await machine.export_port(0, 8080)

    async def served() -> bool:
        return await fetch(forward.host_port) == "exported"

    await eventually(served)

    synced = await machine.clocksync()
    assert abs(synced.offset_after_s) < 0.5
    await said(machine, "date", "-s", "@1000000000")
    assert (await machine.clocksync()).offset_before_s < -1e8
    assert abs((await machine.clocksync()).offset_before_s) < 0.5

    await machine.vm_pause()
    await machine.vm_resume()
    assert (await machine.vm_state()).state is ovm.VMState.RUNNING


async def test_its_disks_are_never_swapped(machine: ovm.OVM) -> None:
    """What is written to the root is gone after a stop; what podman keeps is there, over a reboot too."""
    await said(machine, "touch", "/scratched", "/var/lib/containers/kept")
    sizes = await said(machine, "cat", "/sys/block/vda/ro", "/sys/block/vdb/ro", "/sys/block/vdc/ro")
    assert sizes.split() == ["1", "0", "0"]
    ready: list[None] = []
    errors: list[ovm.OVMError] = []
    machine.on("ready", lambda: ready.append(None))
    machine.on("error", errors.append)
    await machine.exec(["sh", "-c", "sync; (sleep 0.2; echo b >/proc/sysrq-trigger) >/dev/null 2>&1 &"])
    async with asyncio.timeout(600):
        while not ready:
            assert machine.state is not ovm.VMState.STOPPED, errors
            await asyncio.sleep(0.1)
    await said(machine, "test", "-e", "/var/lib/containers/kept")
    await said(machine, "test", "!", "-e", "/scratched")
    await machine.stop()
    with (machine.options.target_dir / "data.img").open("rb") as data:
        data.seek(0x10040)
        assert data.read(8) == b"_BHRfS_M"
    await machine.start()
    await said(machine, "test", "-e", "/var/lib/containers/kept")
    async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
        assert (await client.get(f"http://127.0.0.1:{machine.info.podman_port}/libpod/_ping")).text == "OK"


async def test_a_data_disk_that_lost_its_file_system_is_not_formatted(options: dict[str, Any]) -> None:
    """The guest would make a new one and nobody would know what is gone."""
    machine = await under.create(options)
    machine_json = machine.options.target_dir / "machine.json"
    machine_json.write_text(machine_json.read_text().replace("false", "true"))
    with pytest.raises(ovm.FileError, match="no longer holds a btrfs"):
        await machine.start()
    assert machine.state is ovm.VMState.STOPPED


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"environment": {"A": "b"}}, "environment"),
        ({"mounts": [{"hostPath": "/", "guestPath": f"/{'long' * 30}/{n}"} for n in range(12)]}, "2048"),
    ],
)
async def test_what_cannot_be_told_is_refused(
    options: dict[str, Any], short_path: Path, more: Any, message: str
) -> None:
    """Before anything is touched."""
    with pytest.raises(ovm.OptionError, match=message):
        await under.create(options, **more)
    assert list(short_path.iterdir()) == []
