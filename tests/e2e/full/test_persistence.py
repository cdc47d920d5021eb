"""What people would miss survives a stop, a reboot, a reset and an upgrade."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import ovm
import under
from full import BUSYBOX_IMAGE, MachineOptions, Podman, busybox_tar, eventually, fetch

pytestmark = pytest.mark.full

QUADLET = f"""[Container]
Image={BUSYBOX_IMAGE}
Exec=sh -c "echo quadlet > /tmp/hello; exec httpd -f -p 80 -h /tmp"
PublishPort=127.0.0.1:PORT:80

[Install]
WantedBy=multi-user.target
"""


async def test_a_life(options_for: MachineOptions, second_image: Path, tmp_path: Path) -> None:
    """One machine through its life: volume, restart policy and quadlet over reboot, stop, reset and upgrade."""
    name = f"life-{tmp_path.name[-1]}"  # another one if it is run again
    machine = await under.create(options_for(name))
    podman = Podman(machine, tmp_path)
    seen: list[str] = []
    for event in ("ready", "close", "error"):
        machine.on(event, lambda *_, event=event: seen.append(event))  # type: ignore[misc]

    await machine.start()
    web, quadlet = [(await machine.export_port(0, 1)).host_port for _ in range(2)]
    for port in (web, quadlet):
        await machine.unexport_port(port)
    await podman("import", busybox_tar(tmp_path / "busybox.tar"), BUSYBOX_IMAGE)
    serve = "echo policy > /tmp/hello; exec httpd -f -p 80 -h /tmp"
    await podman("run", "--rm", "-v", "kept:/data", BUSYBOX_IMAGE, "sh", "-c", "echo precious > /data/file; sync")
    await podman(
        "run", "-d", "--restart", "always", "-p", f"{web}:80", "--name", "web", BUSYBOX_IMAGE, "sh", "-c", serve
    )
    unit = QUADLET.replace("PORT", str(quadlet)).encode()
    await machine.exec(["sh", "-c", "cat > /etc/containers/systemd/greeter.container"], stdin=unit)

    async def everything_is_back() -> None:
        await serves(web, "policy")
        await serves(quadlet, "quadlet")
        assert (await podman("run", "--rm", "-v", "kept:/data", BUSYBOX_IMAGE, "cat", "/data/file")).out == "precious"

    # a reboot from inside: the machine says so, and everything comes back by itself
    again = asyncio.Event()
    remove = machine.on("ready", again.set)
    await machine.exec(["systemctl", "start", "--no-block", "reboot.target"])
    async with asyncio.timeout(180):
        await again.wait()
    remove()
    await everything_is_back()

    await machine.stop()
    assert seen == ["ready", "ready", "close"]
    with pytest.raises(ovm.StateError):
        _ = machine.info
    async with machine:
        with pytest.raises(ovm.StateError):
            await machine.reset_path()
        await everything_is_back()

    # files restored from their origins, and an image built at another time put in their place
    rootfs = machine.options.target_dir / "rootfs.btrfs"
    with rootfs.open("r+b") as file:
        file.write(b"damaged")
    await machine.reset_path()
    with rootfs.open("rb") as file:
        assert file.read(7) != b"damaged"
    before = rootfs.stat()
    newer = options_for(name, image_dir=second_image)
    upgraded = await under.create(newer | {"versions": dict.fromkeys(newer["versions"], "2")})
    assert (rootfs.stat().st_ino, rootfs.stat().st_mtime_ns) != (before.st_ino, before.st_mtime_ns)
    podman.machine = machine = upgraded
    async with machine:
        await everything_is_back()

    await machine.reset_path(data=True)
    async with machine:
        assert (await podman("volume", "ls", "-q")).out == ""


async def serves(port: int, words: str) -> None:
    """A web server on the host's loopback says ``words``."""

    async def asked() -> bool:
        return await fetch(port) == words

    await eventually(asked, timeout_s=90)
