"""What users reported of this engine's rivals, tried on ours: one guest for all, and docker's own client."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ovm
import under
from dockers import Docker
from full import BUSYBOX_IMAGE, busybox_tar, options


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[Path]:
    """A directory whose paths leave room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="ovm-", dir=Path("/tmp").resolve()) as base:
        yield Path(base)


@pytest.fixture(scope="session")
def options_for(image: Path, gvproxy: Path, short_tmp: Path) -> Callable[[str], dict[str, Any]]:
    """Options of a machine under QEMU with directories of its own; for ``under.create``."""

    def make(name: str) -> dict[str, Any]:
        (short_tmp / name).mkdir()
        return options(short_tmp / name, image, gvproxy)

    return make


@pytest.fixture(scope="session")
async def vm(options_for: Callable[[str], dict[str, Any]]) -> AsyncIterator[ovm.OVM]:
    """The machine that the reports share."""
    machine = await under.create(options_for("vm"))
    async with machine:
        yield machine


@pytest.fixture(scope="session")
async def docker(vm: ovm.OVM, tmp_path_factory: pytest.TempPathFactory) -> Docker:
    """docker's client of the shared machine, with the busybox image imported."""
    home = tmp_path_factory.mktemp("docker")
    client = Docker(vm.info.docker_host, home)
    await client("import", str(busybox_tar(home / "busybox.tar")), BUSYBOX_IMAGE)
    return client
