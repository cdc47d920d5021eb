"""The example and the promises of the seed's README, on one machine under vfkit; docs/seed.md has both."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import socket
import stat
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

import ovm
import tiny
import under
from ovm.model.events import EVENT_NAMES
from ovm.paths import SOCKET_NAMES

PAGE = Path(__file__).parents[2] / "docs" / "seed.md"
NAMES = ("gvproxy", "vfkit", "initrd", "kernel", "rootfs")
STALE = (*SOCKET_NAMES, "vfkit-1f-2e.sock")


@dataclass
class Seed:
    """The example's machine, what it has told, and the host's sleep as it hears of it."""

    machine: ovm.OVM
    heard: list[str] = field(default_factory=list)
    stale: dict[str, int] = field(default_factory=dict)
    """The sockets that lay in its way when it was started, and when they were made."""


@dataclass
class Host:
    """Sleeps and wakes when it is told to."""

    sleep: Callable[[], Awaitable[None]] | None = None
    wake: Callable[[], Awaitable[None]] | None = None

    @contextlib.asynccontextmanager
    async def watch(
        self, on_sleep: Callable[[], Awaitable[None]], on_wake: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[None]:
        self.sleep, self.wake = on_sleep, on_wake
        yield


def program(number: int, root: Path) -> dict[str, Any]:
    """The names that a program of the page defines, with ``root`` for its /example."""
    source = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[number]
    names: dict[str, Any] = {}
    exec(compile(source.replace("/example", str(root)), PAGE.name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def root(image: Path, gvproxy: Path) -> Iterator[Path]:
    """The seed's /example, with the five files in it."""
    origins = {"gvproxy": gvproxy, "vfkit": under.vfkit(), "initrd": image / "initrd", "bzImage": image / "kernel"}
    with tempfile.TemporaryDirectory(prefix="ovm-", dir="/tmp") as directory:
        for name, origin in {**origins, "rootfs.btrfs": image / "rootfs.btrfs"}.items():
            (Path(directory) / name).symlink_to(origin)
        yield Path(directory)


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


@pytest.fixture(scope="module")
async def seed(root: Path, host: Host) -> AsyncIterator[Seed]:
    """The example, run: its machine, whose way was barred by sockets of a run that was killed."""
    made: list[Seed] = []

    async def create(options: dict[str, Any]) -> ovm.OVM:
        one = Seed(await ovm.create_darwin_ovm(options))
        made.append(one)
        life = one.machine._life
        life.collaborators = dataclasses.replace(life.collaborators, watch_power=host.watch)
        for name in EVENT_NAMES:
            one.machine.on(name, lambda *_, name=name: one.heard.append(name))
        for name in STALE:
            path = Path(options["socketDir"]) / name
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
            one.stale[name] = path.stat().st_ctime_ns
        return one.machine

    example = program(0, root)
    example["create_darwin_ovm"] = create
    await example["main"]()
    yield made[0]
    await made[0].machine.stop()


@pytest.mark.full
async def test_the_example_runs(seed: Seed, root: Path) -> None:
    """``info`` has the two ports; podman answers on one of them, sshd on the other."""
    assert seed.machine.state is ovm.VMState.RUNNING
    assert seed.heard[0] == "ready"
    info = seed.machine.info
    assert (info.hypervisor, info.ssh_user) == ("vfkit", "root")
    async with httpx2.AsyncClient(timeout=60, trust_env=False) as client:
        assert (await client.get(f"http://127.0.0.1:{info.podman_port}/libpod/_ping")).text == "OK"
    reader, writer = await asyncio.open_connection("127.0.0.1", info.ssh_port)
    with contextlib.closing(writer):
        async with asyncio.timeout(60):
            assert (await reader.readline()).startswith(b"SSH-2.0-")
    assert info.ssh_key == root / "ssh" / "ovm"


@pytest.mark.full
async def test_every_directory_has_what_is_promised(seed: Seed, root: Path) -> None:
    """Copies and versions in targetDir, live sockets in socketDir, logs in logDir, the pair of keys in sshKeyDir."""
    files = {path.name for path in (root / "target").iterdir()}
    assert files >= {"gvproxy", "vfkit", "initrd", "bzImage", "rootfs.btrfs", "versions.json"}
    assert not any(path.is_symlink() for path in (root / "target").iterdir())
    assert json.loads((root / "target" / "versions.json").read_text()) == dict.fromkeys(NAMES, "1.0.0")
    sockets = {path.name: path for path in (root / "socket").iterdir() if path.is_socket()}
    assert {"network.sock", "net.sock", "vfkit.sock", "podman.sock"} <= set(sockets)
    assert stat.S_IMODE((root / "socket").stat().st_mode) == 0o700
    assert {"gvproxy.log", "vfkit.log"} <= {path.name for path in (root / "log").iterdir()}
    assert {"ovm", "ovm.pub"} <= {path.name for path in (root / "ssh").iterdir()}


@pytest.mark.full
async def test_a_start_removes_the_sockets_in_its_way(seed: Seed, root: Path) -> None:
    """Those that a killed run left: each is gone, or another now."""
    now = {path.name: path.stat().st_ctime_ns for path in (root / "socket").iterdir()}
    assert set(seed.stale) == set(STALE)
    assert [name for name, changed in seed.stale.items() if now.get(name) == changed] == []


@pytest.mark.full
async def test_the_same_in_snake_case(seed: Seed, root: Path) -> None:
    """Keywords in Python's spelling make the same machine, and a zipped rootfs is unpacked to the same bytes."""
    rootfs = root / "rootfs.btrfs"
    with zipfile.ZipFile(root / "rootfs.btrfs.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(rootfs, rootfs.name)
    elsewhere = root / "again"
    elsewhere.mkdir()
    for name in ("gvproxy", "vfkit", "initrd", "bzImage", "rootfs.btrfs.zip"):
        (elsewhere / name).symlink_to(root / name)
    again = await program(1, elsewhere)["create"]()

    def told(machine: ovm.OVM) -> str:
        return repr(machine.options).replace(str(elsewhere), str(root)).replace(".btrfs.zip", ".btrfs")

    assert told(again) == told(seed.machine)
    unpacked = elsewhere / "target" / "rootfs.btrfs"
    process = await asyncio.create_subprocess_exec("cmp", str(unpacked), str(rootfs))
    assert await process.wait() == 0
    assert not (elsewhere / "target" / "rootfs.btrfs.zip").exists()


@pytest.mark.full
async def test_an_exported_port_carries_both_ways(seed: Seed) -> None:
    """``exportPort(hostPort, guestPort)``: what is sent arrives, and the answer comes back."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with seed.machine.process(["busybox", "nc", "-ll", "-p", "7007", "-e", "cat"]):
        await seed.machine.export_port(port, 7007)
        async with asyncio.timeout(60):
            answer = b""
            while not answer:  # it may not listen yet
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                with contextlib.closing(writer), contextlib.suppress(ConnectionError):
                    writer.write(b"there and back\n")
                    answer = await reader.readline()
        assert answer == b"there and back\n"
        await seed.machine.unexport_port(port)


async def set_back(machine: ovm.OVM) -> None:
    """Let the guest's clock be an hour slow, and nobody but us set it right."""
    await machine.exec(["chronyc", "offline"])
    assert (await machine.exec(["sh", "-c", "date -s @$(($(date +%s) - 3600))"])).exit_status == 0


async def slow_by_s(machine: ovm.OVM) -> float:
    return time.time() - float((await machine.exec(["date", "+%s"])).text)


@pytest.mark.full
async def test_clocksync(seed: Seed) -> None:
    """The guest's clock is set to the host's first; then it is chrony's turn, with the seed's servers."""
    await set_back(seed.machine)
    found = await seed.machine.clocksync()
    assert found.offset_before_s < -3000
    assert abs(found.offset_after_s) < 60
    assert abs(await slow_by_s(seed.machine)) < 60
    conf = (await seed.machine.exec(["cat", "/etc/chrony/chrony.conf"])).text
    assert re.findall(r"^(?:pool|server) (\S+)", conf, re.MULTILINE) == [
        "pool.ntp.org",
        "time.apple.com",
        "time.windows.com",
    ]


@pytest.mark.full
async def test_pause_and_resume(seed: Seed) -> None:
    """The state and what can be done say so; a resume sets the clock by itself; each may be called twice."""
    machine, before = seed.machine, len(seed.heard)
    await set_back(machine)
    await machine.vm_pause()
    await machine.vm_pause()
    paused = await machine.vm_state()
    assert paused == ovm.StateInfo(
        state=ovm.VMState.PAUSED, can_pause=False, can_resume=True, can_stop=True, can_hard_stop=True
    )
    assert paused.state == "VirtualMachineStatePaused"
    await machine.vm_resume()
    assert (await machine.vm_state()).state == "VirtualMachineStateRunning"
    assert abs(await slow_by_s(machine)) < 60
    await machine.vm_resume()
    assert seed.heard[before:] == ["vmPause", "vmResume"]


@pytest.mark.full
async def test_sleep_and_wake(seed: Seed, host: Host) -> None:
    """While the host sleeps the machine is paused; it wakes with its host, and with the right time."""
    assert host.sleep is not None
    assert host.wake is not None
    before = len(seed.heard)
    await set_back(seed.machine)
    await host.sleep()
    assert (await seed.machine.vm_state()).state == "VirtualMachineStatePaused"
    await host.wake()
    assert (await seed.machine.vm_state()).state == "VirtualMachineStateRunning"
    assert abs(await slow_by_s(seed.machine)) < 60
    assert seed.heard[before:] == ["vmPause", "vmResume"]


@pytest.mark.full
async def test_the_rootfs_cannot_be_spoilt(seed: Seed) -> None:
    """What a power cut could hurt is not written to: the guest's disk of it refuses."""
    roots = (await seed.machine.exec(["sh", "-c", "grep -l 1 /sys/block/vd*/ro"])).text
    assert roots == "/sys/block/vda/ro"
    refused = await seed.machine.exec(["dd", "if=/dev/zero", "of=/dev/vda", "bs=512", "count=1"])
    assert refused.exit_status != 0


ORIGINS = {"gvproxy": "gvproxy", "vfkit": "vfkit", "kernel": "kernel", "initrd": "tiny.initrd", "rootfs": "tiny.rootfs"}


@pytest.mark.tiny
@under.VFKIT_ALONE
async def test_an_upgrade_takes_effect(machines: tiny.Machines) -> None:
    """Another version of one file replaces that file alone; without one, another origin changes nothing."""
    target = (await machines()).ovm.options.target_dir
    for name, file in ORIGINS.items():
        (target / file).write_bytes(b"old")
        await machines()
        assert (target / file).read_bytes() == b"old", "the version is the same"
        versions = machines.options()["versions"] | {name: "2"}
        before = {other: (target / other).stat().st_ino for other in ORIGINS.values() if other != file}
        await machines(versions=versions)
        assert (target / file).stat().st_size == Path(machines.options()["origin_path"][name]).stat().st_size
        assert {other: (target / other).stat().st_ino for other in before} == before
        await machines()


@pytest.mark.tiny
@under.VFKIT_ALONE
async def test_reset_path_heeds_no_version(machines: tiny.Machines) -> None:
    """Every file is as its origin again, though its version is the recorded one; then it boots."""
    m = await machines()
    target, origins = m.ovm.options.target_dir, m.ovm.options.origin_path.named()
    for file in ORIGINS.values():
        (target / file).write_bytes(b"damaged")
    recorded = (target / "versions.json").read_bytes()
    await m.ovm.reset_path()
    assert {name: (target / file).read_bytes() == origins[name].read_bytes() for name, file in ORIGINS.items()} == (
        dict.fromkeys(ORIGINS, True)
    )
    assert (target / "versions.json").read_bytes() == recorded
    async with m.ovm:
        assert m.events == ["ready"]
