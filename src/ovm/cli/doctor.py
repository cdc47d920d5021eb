"""``ovm doctor``: check what this host has and lacks, and print how to install the rest."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from ovm.cli import json_option, run
from ovm.cli.outlet import say_json, say_styled
from ovm.cli.output import filled, format_option

if TYPE_CHECKING:
    from ovm.disks.verify import FileState
    from ovm.host.programs import Helper
    from ovm.hypervisors.macos import MacHost
    from ovm.process.probe import Version

Status = Literal["ok", "warn", "missing", "damaged"]

SPACE_NEEDED_MIB = 2 * 1024
"""Space for a guest image and its build."""
SPACE_WANTED_MIB = 10 * 1024
"""Space for a few container images too."""
OLDEST_PYTHON = (3, 11)

_COLOURS = {"ok": "green", "warn": "yellow", "missing": "red", "damaged": "red"}
_BUILD_TOOLS = {"mmdebstrap": "mmdebstrap", "mkfs.btrfs": "btrfs-progs", "xz": "xz-utils"}
"""Programs that the image builder runs, and their Debian packages."""
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Directories of some of them, which are not on an ordinary user's PATH on Debian."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table. No machine starts while a check is ``missing`` or ``damaged``."""

    name: str
    status: Status
    detail: str
    hint: str = ""


@click.command("doctor")
@click.argument("machine", default="")
@click.option("--verify", is_flag=True, help="Also compare the machines' files with their digests.")
@json_option
@format_option
def command(machine: str, verify: bool, as_json: bool, template: str | None) -> int:
    """Check this host for everything that ovm needs.

    With --verify, also check the files that machines boot from: those of all named machines, or of MACHINE, a name or
    a target_dir. The exit status is 0 if nothing required is missing or damaged.
    """
    if machine and not verify:
        raise click.UsageError("MACHINE requires --verify")
    checks = run(examine()) + (run(check_files(machine)) if verify else [])
    fine = all(check.status in {"ok", "warn"} for check in checks)
    if as_json:
        say_json({"ok": fine, "checks": [asdict(check) for check in checks]})
    elif template is not None:
        for check in checks:
            filled(asdict(check), template)
    else:
        for status, line in table(checks):
            say_styled("", status, line, fg=_COLOURS.get(status.strip()))
    return 0 if fine else 1


async def examine(platform: str = sys.platform) -> list[Check]:
    """Run every check for ``platform``, in the order of the table."""
    import asyncio

    from ovm.registry import images as registry

    arch = registry.host_arch()
    found = await asyncio.gather(*(_mac_programs() if platform == "darwin" else _linux_programs(arch)))
    image = check_image(registry.default_image_dir(arch), platform)
    return [
        check_python(),
        check_platform(platform),
        *(check for checks in found for check in checks),
        image,
        *(check_build_tools(needed=image.status != "ok") if platform != "darwin" else []),
        check_space(),
        check_socket_dir(platform),
        check_home(),
    ]


def _linux_programs(arch: str) -> list[Awaitable[list[Check]]]:
    from ovm.host import programs

    return [
        _helper("QEMU", lambda: programs.find_qemu(arch)),
        _accelerator(arch),
        _helper("gvproxy", programs.find_gvproxy),
        _virtiofsd(),
    ]


def _mac_programs() -> list[Awaitable[list[Check]]]:
    from ovm.host import programs
    from ovm.hypervisors import macos

    return [
        _helper("vfkit", programs.find_vfkit, partial(macos.check_program, entitled=True)),
        _helper("gvproxy", programs.find_gvproxy, partial(macos.check_program, entitled=False)),
    ]


async def check_files(machine: str = "") -> list[Check]:
    """Compare the files in a ``target_dir`` with their digests: of ``machine``, or of all named machines.

    The machines may be running.
    """
    from ovm.disks.verify import verify

    checks = []
    for name, target in _targets(machine).items():
        files = await verify(target)
        checks += [_check_of(name, file) for file in files]
        if not files:
            how = "start the machine, which creates them: it never started, or its creation was interrupted"
            checks.append(Check(f"{name}: files", "warn", f"no files are recorded in {target}", how))
    return checks


def _targets(machine: str) -> dict[str, Path]:
    from ovm import paths
    from ovm.registry import machines

    if "/" in machine:
        return {machine: paths.expanded(machine).absolute()}
    named = paths.machine_dir("x").parent
    names = [machines.check_name(machine)] if machine else sorted(path.name for path in named.glob("*"))
    return {name: paths.machine_dir(name) / "target" for name in names}


def _check_of(machine: str, file: FileState) -> Check:
    name = f"{machine}: {file.name}"
    if file.state == "ok":
        return Check(name, "ok", f"{file.path} is undamaged")
    if file.state == "unknown":
        return Check(
            name,
            "warn",
            file.detail,
            "call reset_path(): it recreates the files and records their digests; data is kept",
        )
    hint = "stop the machine and remove the file: the next start copies it again, and data is kept; or reset_path()"
    return Check(name, file.state, f"{file.path}: {file.detail}", hint)


def table(checks: Iterable[Check]) -> list[tuple[str, str]]:
    """Return the lines to print, as status and text: each check, and its hint below it unless it is ok."""
    rows = list(checks)
    width = max(len(check.name) for check in rows)
    lines = []
    for check in rows:
        lines.append((f"{check.status:<7}", f"  {check.name:<{width}}  {check.detail}"))
        if check.hint and check.status != "ok":
            lines.append(("", f"{'':9}{'':{width}}  → {check.hint}"))
    return lines


def check_python() -> Check:
    """Check Python's version, which is too old only in a broken installation."""
    version = sys.version_info
    text = f"{version.major}.{version.minor}.{version.micro} ({sys.executable})"
    if version < OLDEST_PYTHON:
        return Check("python", "missing", text, "install Python 3.11 or newer")
    return Check("python", "ok", text)


def check_platform(platform: str) -> Check:
    """Check that machines run on this operating system."""
    if platform == "linux":
        return Check("system", "ok", f"Linux {os.uname().release}")
    if platform == "darwin":
        from ovm.hypervisors import macos

        return check_mac(macos.this_host(), _image_linux())
    return Check("system", "missing", platform, "use Linux or macOS")


def check_mac(host: MacHost, linux: Version | None) -> Check:
    """Check that machines run on this Mac, with the default image's kernel version ``linux``."""
    from ovm.errors import UnsupportedError
    from ovm.hypervisors import macos
    from ovm.process.probe import show_version

    chip = "Apple" if host.arch == "arm64" or host.translated else "Intel"
    detail = f"macOS, version {show_version(host.version)}, {chip} chip"
    try:
        macos.check_host(host, rosetta=False)
        macos.check_kernel_on_host(host, linux)
    except UnsupportedError as error:
        return Check("system", "missing", f"{detail}; {error.message}", error.hint)
    return Check("system", "ok", detail)


def _image_linux() -> Version | None:
    from ovm.errors import ImageError
    from ovm.hypervisors import macos
    from ovm.registry import images as registry

    try:
        return macos.linux_version(registry.load_image(registry.default_image_dir(registry.host_arch())).path("kernel"))
    except ImageError:
        return None


def check_image(directory: Path, platform: str) -> Check:
    """Check the default guest image. A missing one is only a warning on Linux, where the first start builds it."""
    from ovm.errors import ImageError
    from ovm.registry import images as registry

    try:
        image = registry.load_image(directory)
    except ImageError as error:
        return Check("guest image", "missing" if platform == "darwin" else "warn", error.message, error.hint)
    return Check("guest image", "ok", f"{image.directory}")


def check_build_tools(*, needed: bool) -> list[Check]:
    """Check the image builder's programs, which are required only while there is no image."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])
    lacking = [package for program, package in _BUILD_TOOLS.items() if not shutil.which(program, path=path)]
    absent: Status = "missing" if needed else "warn"
    checks = [
        Check("image builder", absent, f"without {', '.join(lacking)}", f"apt install {' '.join(lacking)}")
        if lacking
        else Check("image builder", "ok", ", ".join(_BUILD_TOOLS))
    ]
    if os.geteuid() != 0:
        checks.append(_subordinate_ids(absent, path))
    return checks


def _subordinate_ids(absent: Status, path: str) -> Check:
    user = _user()
    if not shutil.which("newuidmap", path=path):
        return Check("user namespace", absent, "without newuidmap", "apt install uidmap")
    for table_of in (Path("/etc/subuid"), Path("/etc/subgid")):
        lines = table_of.read_text().splitlines() if table_of.exists() else []
        if not any(line.split(":")[0] in {user, str(os.getuid())} for line in lines):
            return Check(
                "user namespace",
                absent,
                f"{table_of} has no range for {user}",
                f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
            )
    return Check("user namespace", "ok", "newuidmap and a range of IDs; images are built without root")


def _user() -> str:
    """Return the user's name, or the user ID if it has no account."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def check_space() -> Check:
    """Check the free space for images and disks."""
    from ovm import paths

    home = paths.home()
    usage = shutil.disk_usage(_existing(home))
    free_mib = usage.free // (1024 * 1024)
    detail = f"{free_mib / 1024:.1f} GiB free for {home}"
    hint = "free some space, or choose another disk with OVM_HOME"
    if free_mib < SPACE_NEEDED_MIB:
        return Check("disk space", "missing", detail, hint)
    if free_mib < SPACE_WANTED_MIB:
        return Check("disk space", "warn", detail, hint)
    return Check("disk space", "ok", detail)


def check_socket_dir(platform: str) -> Check:
    """Check that the default socket directory has a short path and is private to this user."""
    from ovm import paths
    from ovm.errors import SocketPathError
    from ovm.hypervisors import vfkit

    directory = paths.default_socket_dir("default")
    try:
        if platform == "darwin":
            paths.check_socket_paths(directory, vfkit.LOCAL_SOCKET_LONGEST)
            vfkit.check_paths((), directory)
        else:
            paths.check_socket_paths(directory)
    except SocketPathError as error:
        return Check("socket paths", "missing", error.message, "set XDG_RUNTIME_DIR to a short private directory")
    return _private("socket paths", directory)


def check_home() -> Check:
    """Check that the data directory can be written by this user and not by others."""
    from ovm import paths

    return _private("data directory", paths.home(), may_read=True)


def _private(name: str, directory: Path, *, may_read: bool = False) -> Check:
    from ovm.errors import FileError
    from ovm.trust import directories

    try:
        exists = directories.check(directory)
    except FileError as error:
        return Check(name, "missing", error.message, error.hint)
    existing = _existing(directory)
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check(
            name, "missing", f"{existing} is not writable", "change its owner, or set OVM_HOME to another directory"
        )
    mode = stat.S_IMODE(directory.stat().st_mode) if exists else 0
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and not may_read:
        return Check(name, "warn", f"{directory} is open to others ({mode:o})", f"chmod 700 {directory}")
    return Check(name, "ok", str(directory))


def _existing(directory: Path) -> Path:
    """Return the directory, or its nearest existing parent."""
    return next(path for path in (directory, *directory.parents) if path.exists())


async def _helper(
    name: str, find: Callable[[], Awaitable[Helper]], check: Callable[[Path], Awaitable[None]] | None = None
) -> list[Check]:
    from ovm.errors import InputError

    try:
        found = await find()
        if check is not None:
            await check(found.path)
    except InputError as error:
        return [Check(name, "missing", "; ".join([error.message, *error.log_tail]), error.hint)]
    return [Check(name, "ok", str(found))]


async def _virtiofsd() -> list[Check]:
    from ovm.errors import HelperError
    from ovm.host import programs

    name = "virtiofsd"
    try:
        found = await programs.find_virtiofsd()
    except HelperError as error:
        why = "; ".join([error.message, *error.log_tail])
        return [Check(name, "warn", f"{why}; needed to share folders", error.hint)]
    if found.flavour == "c":
        hint = "install the virtiofsd written in Rust: the package virtiofsd of newer systems"
        return [Check(name, "warn", f"{found}: QEMU's old virtiofsd needs root and ignores read-only", hint)]
    return [Check(name, "ok", str(found))]


async def _accelerator(arch: str) -> list[Check]:
    from ovm import hypervisors, paths
    from ovm.errors import OVMError
    from ovm.host import programs
    from ovm.hypervisors import accel
    from ovm.registry import images as registry

    name = "accelerator"
    try:
        found = await programs.find_qemu(arch)
        kernel = registry.load_image(registry.default_image_dir(arch)).path("kernel")
    except OVMError:
        return [Check(name, "warn", "unknown until there are QEMU and a guest image", "ovm image build")]
    emulator = accel.Emulator(program=found.path, version=found.version, arch=hypervisors.host_arch())
    answer = await accel.choose("auto", emulator, kernel=kernel, cache_dir=paths.cache_dir())
    if answer.accelerator == "tcg":
        hint = "make /dev/kvm work: enable virtualization (nested, in a VM) and join the group kvm"
        return [Check(name, "warn", f"tcg, several times slower: {answer.reason}", hint)]
    return [Check(name, "ok", f"{answer.accelerator}: {answer.reason}")]
