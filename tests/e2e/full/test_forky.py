"""The guest made of the next Debian, whose podman is newer: it boots, and clients do with it what they do with ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import clients
import ovm
import under
from full import BUSYBOX_IMAGE, MachineOptions, Podman, busybox_tar
from ovm.image import load_image

pytestmark = [pytest.mark.forky, under.QEMU_ALONE]

CLIENTS = ("Docker", "Podman", "DockerPy", "PodmanPy", "Testcontainers")


@pytest.fixture(scope="module")
async def machine(
    forky_image: Path, options_for: MachineOptions, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ovm.OVM]:
    """One that runs, with the image that the clients use."""
    home = tmp_path_factory.mktemp("podman")
    async with await under.create(options_for("forky", image_dir=forky_image)) as made:
        await Podman(made, home)("import", busybox_tar(home / "busybox.tar"), BUSYBOX_IMAGE)
        yield made


async def test_the_engine_is_the_newer_one(machine: ovm.OVM, forky_image: Path) -> None:
    """And the image says which suite it is made of."""
    image = load_image(forky_image)
    assert image.suite == "forky"
    version = (await machine.exec(["podman", "version", "--format", "{{.Server.Version}}"])).text
    assert tuple(map(int, version.split(".")[:2])) >= (5, 8)
    assert image.versions["podman"].startswith(version)
    failed = await machine.exec(["systemctl", "list-units", "--failed", "--plain", "--no-legend"])
    assert failed.text == ""


@pytest.mark.parametrize("kind", CLIENTS)
async def test_it_does_what_it_does_with_any_engine(
    kind: str, machine: ovm.OVM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As test_clients.py asks of the guest that is released."""
    monkeypatch.setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
    monkeypatch.setenv("DOCKER_HOST", machine.info.docker_host)
    with clients.opened(kind, machine.info.docker_host, tmp_path) as client:
        await asyncio.to_thread(clients.check, client, tmp_path)
