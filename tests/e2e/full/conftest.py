"""The full guest: one machine for the whole session, and ordinary clients to drive it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import composing
import ovm
import under
from full import BUSYBOX_IMAGE, Authority, MachineOptions, Podman, busybox_tar, options


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[Callable[[str], Path]]:
    """Makes directories whose paths leave room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="ovm-", dir=Path("/tmp").resolve()) as base:

        def make(name: str) -> Path:
            path = Path(base) / name
            path.mkdir(exist_ok=True)
            return path

        yield make


@pytest.fixture(scope="session")
def options_for(image: Path, gvproxy: Path, short_tmp: Callable[[str], Path], hypervisor: str) -> MachineOptions:
    """Options of a machine of the full guest with directories of its own; for ``under.create``."""

    def make(name: str, *, image_dir: Path = image, **more: object) -> dict[str, Any]:
        vfkit = under.vfkit() if hypervisor == "vfkit" else None
        return options(short_tmp(f"{name}-{hypervisor}"), image_dir, gvproxy, vfkit, **more)

    return make


@pytest.fixture(scope="session")
def shared(short_tmp: Callable[[str], Path], hypervisor: str) -> tuple[Path, Path]:
    """Two host folders for the machine: one to write to, one only to read; their names as odd as can be carried."""
    base = short_tmp(f"shared-{hypervisor}")
    odd = "to write, here" if hypervisor == "qemu" else "to write = here"
    writable, readable = base / odd, base / "to read"
    for folder in (writable, readable):
        folder.mkdir()
        (folder / "from-host").write_text("hello from the host\n")
    return writable, readable


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Made by openssl, as a company would."""
    base = tmp_path_factory.mktemp("ca")
    ca, ca_key, key, request, certificate = (base / n for n in ("ca.pem", "ca.key", "key.pem", "csr.pem", "cert.pem"))
    names = base / "names"
    names.write_text("subjectAltName=DNS:host.containers.internal\n")
    openssl = under.program("openssl")
    new_key = [openssl, "req", "-newkey", "rsa:2048", "-nodes", "-batch"]
    sign = [openssl, "x509", "-req", "-days", "30", "-CA", ca, "-CAkey", ca_key, "-CAcreateserial"]
    for command in (
        [*new_key, "-x509", "-days", "30", "-subj", "/CN=ovm test authority", "-keyout", ca_key, "-out", ca],
        [*new_key, "-subj", "/CN=host.containers.internal", "-keyout", key, "-out", request],
        [*sign, "-in", request, "-extfile", names, "-out", certificate],
    ):
        subprocess.run(command, check=True, capture_output=True)
    return Authority(ca, certificate, key)


@pytest.fixture(scope="session")
async def vm(options_for: MachineOptions, shared: tuple[Path, Path], authority: Authority) -> AsyncIterator[ovm.OVM]:
    """The machine most tests share."""
    writable, readable = shared
    mounts = []
    if under.MAC or os.geteuid() == 0 or shutil.which("virtiofsd") or Path("/usr/libexec/virtiofsd").exists():
        mounts = [ovm.Mount(writable), ovm.Mount(readable, "/mnt/read only", read_only=True)]
    machine = await under.create(
        options_for("vm"),
        mounts=mounts,
        ca_certificates=[authority.ca],
        timezone="Asia/Kolkata",
        environment={"OVM_TEST_VARIABLE": 'with "quotes" and spaces'},
    )
    async with machine:
        yield machine


@pytest.fixture(scope="session")
async def podman(vm: ovm.OVM, tmp_path_factory: pytest.TempPathFactory) -> Podman:
    """A client of the shared machine, with the busybox image imported."""
    home = tmp_path_factory.mktemp("podman")
    client = Podman(vm, home)
    await client("import", busybox_tar(home / "busybox.tar"), BUSYBOX_IMAGE)
    return client


@pytest.fixture
def surroundings(vm: ovm.OVM, podman: Podman, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``ovm env`` sets; ``podman`` has imported the image they all start from."""
    monkeypatch.setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
    monkeypatch.setenv("DOCKER_HOST", vm.info.docker_host)
    return vm.info.docker_host


@pytest.fixture(scope="session", autouse=True)
def compose_is_built(request: pytest.FixtureRequest) -> Iterator[None]:
    """Meanwhile, if a test is to use it."""
    wanted = any(item.path.stem == "test_with_compose" for item in request.session.items)
    with composing.meanwhile() if wanted else contextlib.nullcontext():
        yield
