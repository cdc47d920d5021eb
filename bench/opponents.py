"""Machines that ovm is compared with: Debian's own podman as it comes, and our own image without ovm."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from bench import programs
from bench.samples import AGAIN, SpoiledError
from bench.setting import BOOT_DEADLINE_S, CPUS, MEMORY_MIB, Bench, NotHereError
from ovm.image import apt
from ovm.image.build import KERNEL_PACKAGES, BuildOptions

HERE = Path(__file__).parent
BY_HAND = HERE.parent / "scripts" / "boot-by-hand"
BOOT_STOCK = HERE / "boot-stock"
FINISH_STOCK = HERE / "stock-finish"
STOCK_PACKAGES = ("systemd-sysv", "udev", "dbus", "initramfs-tools", "zstd", "openssh-server", "chrony", "podman")
"""Beside the kernel of ovm's own guest, and all that Debian calls important."""
KEYRINGS = tuple(Path(f"/usr/share/keyrings/debian-archive-keyring.{suffix}") for suffix in ("pgp", "gpg"))
BUILD_DEADLINE_S = 900.0
SETTLE_DEADLINE_S = 2 * BOOT_DEADLINE_S
"""Of a first boot, which makes what the later ones find, and of the shutdown after it."""


def _environment(bench: Bench) -> dict[str, str]:
    told = {
        "GVPROXY": os.fspath(bench.gvproxy.path),
        "QEMU": os.fspath(bench.qemu.path),
        "CPUS": str(CPUS),
        "MEMORY": str(MEMORY_MIB),
        "SSH_PORT": "-1",  # nobody uses it, and it may be taken
    }
    return os.environ | told | ({"ACCEL": "kvm"} if bench.accelerator == "kvm" else {})


async def boot_bare(bench: Bench) -> float:
    """Our image, started by a shell script; the milliseconds until podman answered."""
    return await _boot(bench, BY_HAND, bench.image, bench.work / "bare", "once")


async def boot_stock(bench: Bench, stock: Path) -> float:
    """Debian's podman, started by a shell script; the milliseconds until podman answered."""
    return await _boot(bench, BOOT_STOCK, stock, bench.work / "stock")


async def _boot(bench: Bench, *argv: programs.Argument) -> float:
    try:
        printed = await programs.run(argv, environment=_environment(bench), deadline_s=BOOT_DEADLINE_S)
    except programs.ProgramError as error:
        raise SpoiledError(str(error)) from error
    return float(printed.split()[-1])


async def stock(bench: Bench) -> Path:
    """The files of Debian's own machine: built, and booted once, unless an earlier run has done so.

    Raises:
        NotHereError: it cannot be built on this machine.
    """
    argv = [await asyncio.to_thread(programs.find, "mmdebstrap", "mmdebstrap"), *await _arguments()]
    await asyncio.to_thread(programs.find, "mkfs.ext4", "e2fsprogs")
    built = bench.cache / f"stock-{hashlib.sha256(repr(argv[1:]).encode()).hexdigest()[:16]}"
    if built.exists():
        return built
    try:
        await _build(bench, argv, built)
    except programs.ProgramError as error:
        raise NotHereError(f"no machine of Debian's packages could be made: {error}") from error
    return built


async def _build(bench: Bench, argv: list[str], built: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".stock-", dir=bench.cache) as directory:
        work = Path(directory)
        environment = os.environ | {"LC_ALL": "C.UTF-8", "PATH": programs.search_path()}
        if os.geteuid() == 0:  # else the tree belongs to ids that may not come in here
            environment["TMPDIR"] = directory
        bench.tell("building a machine of Debian's own packages, once")
        await programs.run(argv, environment=environment, cwd=work, deadline_s=BUILD_DEADLINE_S)
        for spoiled in range(1 + AGAIN):
            try:
                files = await _settled(bench, work)
                break
            except programs.ProgramError:
                if spoiled == AGAIN:
                    raise
        files.rename(built)


async def _settled(bench: Bench, work: Path) -> Path:
    """The files of the machine in ``work``'s archive, after its first boot."""
    files = work / "files"
    await asyncio.to_thread(shutil.rmtree, files, ignore_errors=True)
    files.mkdir()
    await programs.run(["tar", "--extract", "--sparse", "--file", work / "stock.tar", "--directory", files])
    bench.tell("booting it, once")
    settle = (BOOT_STOCK, files, bench.work / "stock", "settle")
    await programs.run(settle, environment=_environment(bench), deadline_s=SETTLE_DEADLINE_S)
    return files


async def _arguments() -> list[str]:
    """Mmdebstrap's, with the archives and the proxies that this machine's own apt has."""
    options = BuildOptions()
    finish = await asyncio.to_thread(FINISH_STOCK.read_text, "utf-8")
    packages = ",".join((*STOCK_PACKAGES, KERNEL_PACKAGES[options.arch]))
    sources = apt.guest_sources(await asyncio.to_thread(apt.host_sources, Path("/etc/apt")), options.suite)
    try:
        settings = apt.guest_settings(await programs.run(["apt-config", "dump"]), os.environ)
    except programs.ProgramError:
        settings = []
    return [
        "--format=null",
        *(f"--keyring={path}" for path in KEYRINGS if path.exists()),
        f"--include={packages}",
        *(f"--aptopt={setting}" for setting in settings),
        f"--customize-hook={finish}",  # its text: who builds may not be allowed where it is
        "--customize-hook=download /stock.tar stock.tar",
        "--skip=cleanup",
        options.suite,
        "-",
        *sources,
    ]
