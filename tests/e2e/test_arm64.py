"""The guest for arm64 on any host: QEMU emulates the processor, and the manager takes the host for such a one."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ovm
from ovm import hypervisors
from ovm.errors import HelperError
from ovm.host import programs
from ovm.hypervisors import accel
from ovm.hypervisors.accel import Emulator
from ovm.image import load_image, verify_image

pytestmark = pytest.mark.arm64

BOOT_S = 900.0
IMAGE_MAGIC = (0x38, b"ARM\x64")
"""Of an uncompressed Image, the only kind of kernel that Apple's framework boots."""


@pytest.fixture
def arm64_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the host's processor is told that it is an arm64 one."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert hypervisors.host_arch() == "aarch64"


@pytest.fixture
async def emulator(arm64_host: None) -> Emulator:
    """QEMU for arm64."""
    try:
        found = await programs.find_qemu("arm64")
    except HelperError as error:
        pytest.skip(error.message)
    return Emulator(program=found.path, version=found.version, arch="aarch64")


@pytest.fixture
async def machine(arm64_image: Path, gvproxy: Path, emulator: Emulator, short_path: Path) -> AsyncIterator[ovm.OVM]:
    """A machine that runs, with directories of its own."""
    origins = {"gvproxy": gvproxy, "kernel": arm64_image / "kernel", "initrd": arm64_image / "initrd"}
    origins["rootfs"] = arm64_image / "rootfs.btrfs"
    made = await ovm.create_linux_ovm(
        origin_path=origins,
        versions=dict.fromkeys(origins, "1"),
        target_dir=short_path / "target",
        socket_dir=short_path / "socket",
        log_dir=short_path / "log",
        ssh_key_dir=short_path / "keys",
        accelerator="tcg",
        memory_mib=1536,
        data_disk_mib=8192,
    )
    try:
        await made.start(timeout_s=BOOT_S)
        yield made
    finally:
        await made.stop(force=True)


async def test_the_image_is_whole_and_its_kernel_is_an_image(arm64_image: Path) -> None:
    """It carries what the guest for amd64 carries, and a kernel that needs nobody to unpack it."""
    await verify_image(arm64_image)
    image = load_image(arm64_image)
    assert image.arch == "arm64"
    assert image.packages["podman"].startswith("5.")
    offset, magic = IMAGE_MAGIC
    assert (arm64_image / "kernel").read_bytes()[offset : offset + len(magic)] == magic


async def test_the_probe_knows_the_kernels_panic(arm64_image: Path, emulator: Emulator) -> None:
    """What tells a KVM that works from one that does not, told apart here under emulation."""
    answer = await accel.probe("tcg", emulator, arm64_image / "kernel", timeout_s=BOOT_S)
    assert answer.reason == "a test boot succeeded"


async def test_a_machine_boots_to_podmans_answer(machine: ovm.OVM) -> None:
    """It runs a container of its own processor, and shuts down when it is asked."""
    assert machine.info.accelerator == "tcg"
    assert (await machine.exec(["uname", "-m"])).text == "aarch64"
    script = "tar -cC / bin/busybox usr/bin/busybox | podman import - localhost/busybox >/dev/null && "
    script += "podman run --rm localhost/busybox /usr/bin/busybox uname -m"
    ran = await machine.exec(["sh", "-c", script], timeout_s=BOOT_S)
    assert ran.exit_status == 0, ran.stderr
    assert ran.text == "aarch64"
    await machine.stop()
    assert machine.state == ovm.VMState.STOPPED


async def test_the_guest_hears_the_power_button(machine: ovm.OVM) -> None:
    """A key on a GPIO, with the full kernel's driver; and the guest that powers itself off is no error."""
    heard: list[ovm.OVMError] = []
    closed = asyncio.Event()
    machine.on("error", heard.append)
    machine.on("close", closed.set)
    async with asyncio.timeout(BOOT_S):
        while not closed.is_set():  # a press that comes before the guest listens is lost
            if machine._context.session is not None:
                await machine._context.session.vm.request_stop()
            await asyncio.sleep(1)
    assert heard == []
    assert machine.state == ovm.VMState.STOPPED
