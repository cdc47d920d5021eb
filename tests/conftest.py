"""What several groups of tests need: the programs of this machine, guests, and machines that leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import builds
import built
import homes
import ovm.image
import soak
import tiny
import under
import workers
from ovm.errors import HelperError
from ovm.host import programs
from ovm.image.build import host_arch

BUILD_DEADLINE_S = 900.0
FOREIGN_BUILD_DEADLINE_S = 3600.0


def pytest_configure(config: pytest.Config) -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and children would inherit that."""
    for plugin in (soak, workers):
        config.pluginmanager.register(plugin)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failure is told without the collector: pytest parses sources for it, and what is collected may log a traceback,
    for which CPython 3.11 parses, too; its parser does not survive that ("AST constructor recursion depth mismatch").
    """
    if call.excinfo is not None:
        gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="session")
async def gvproxy() -> Path:
    """The real gvproxy: $OVM_TEST_GVPROXY, or the one that is installed."""
    if chosen := os.environ.get("OVM_TEST_GVPROXY"):
        return Path(chosen)
    try:
        return (await programs.find_gvproxy()).path
    except HelperError as error:
        pytest.skip(error.message)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A private directory with a path short enough for sockets, whatever pytest's own is."""
    directory = Path(tempfile.mkdtemp(prefix="ovm-", dir=Path("/tmp").resolve()))  # a link on macOS
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
async def image() -> Path:
    """A full guest image: $OVM_TEST_IMAGE, else one built once for each state of its sources."""
    if chosen := os.environ.get("OVM_TEST_IMAGE"):
        return Path(chosen).absolute()

    async def build(directory: Path) -> None:
        await ovm.image.build_image(ovm.image.BuildOptions(arch=host_arch(), output=directory))

    return await _built_once("test-image", build)


@pytest.fixture(scope="session")
async def second_image() -> Path:
    """The same built at another time, without privileges where that can be tried: $OVM_TEST_SECOND_IMAGE, or built."""
    if chosen := os.environ.get("OVM_TEST_SECOND_IMAGE"):
        return Path(chosen).absolute()
    return await _built_once("second-test-image", builds.unprivileged)


@pytest.fixture(scope="session")
async def forky_image() -> Path:
    """The guest made of the next Debian: $OVM_TEST_IMAGE_FORKY, or built."""
    if chosen := os.environ.get("OVM_TEST_IMAGE_FORKY"):
        return Path(chosen).absolute()

    async def build(directory: Path) -> None:
        await ovm.image.build_image(ovm.image.BuildOptions(arch=host_arch(), suite="forky", output=directory))

    return await _built_once("forky-test-image", build)


@pytest.fixture(scope="session")
async def arm64_image() -> Path:
    """The guest for arm64: $OVM_TEST_IMAGE_ARM64, or built, which takes many minutes where programs are emulated."""
    if chosen := os.environ.get("OVM_TEST_IMAGE_ARM64"):
        return Path(chosen).absolute()

    async def build(directory: Path) -> None:
        await ovm.image.build_image(ovm.image.BuildOptions(arch="arm64", output=directory))

    return await _built_once("arm64-test-image", build, FOREIGN_BUILD_DEADLINE_S)


async def _built_once(
    kind: str, build: Callable[[Path], Awaitable[object]], deadline_s: float = BUILD_DEADLINE_S
) -> Path:
    if under.MAC:
        pytest.skip("images are built on Linux; OVM_TEST_IMAGE and OVM_TEST_SECOND_IMAGE name some")
    directory = built.CACHE / f"{kind}-{_sources_digest()}"
    with contextlib.ExitStack() as stack:
        missing = await asyncio.to_thread(stack.enter_context, built.once(directory, kind))  # another run may build it
        if missing:
            async with asyncio.timeout(deadline_s):
                await build(directory)
    return directory


def _sources_digest() -> str:
    digest = hashlib.sha256()
    root = Path(ovm.image.__file__).parent
    for path in sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        for part in (os.fsencode(path.relative_to(root)), path.stat().st_mode.to_bytes(4, "big"), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def tiny_guest(image: Path, tmp_path_factory: pytest.TempPathFactory) -> tiny.Guest:
    """The files of the tiny guest."""
    return tiny.build(image, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", params=under.HYPERVISORS)
def hypervisor(request: pytest.FixtureRequest) -> str:
    """What the machines run under."""
    name: str = request.param
    if name not in under.HYPERVISORS:
        pytest.skip(f"there is no {name} here")
    return name


@pytest.fixture
async def machines(
    tiny_guest: tiny.Guest, gvproxy: Path, short_path: Path, hypervisor: str
) -> AsyncIterator[tiny.Machines]:
    """Makes tiny machines; at the end they are ended, and nothing of them may be left."""
    made = tiny.Machines(tiny_guest, gvproxy, short_path, under.vfkit() if hypervisor == "vfkit" else None)
    yield made
    await made.end()


@pytest.fixture
def home(tiny_guest: tiny.Guest, gvproxy: Path, short_path: Path) -> Iterator[homes.Home]:
    """An ``OVM_HOME`` of its own for the command; nothing runs there afterwards."""
    made = homes.Home(short_path, tiny_guest, gvproxy)
    yield made
    made.end()
