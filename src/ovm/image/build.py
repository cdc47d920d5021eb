"""The builder: makes a directory with kernel, initrd, rootfs and image.json from Debian packages.

mmdebstrap installs the packages and runs ``guest/finish``, which does the rest, where the tree's owners are real.
All work happens in a hidden directory beside the target. It atomically replaces the target at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import msgspec

from ovm import paths
from ovm.errors import ImageError, OptionError, SpaceError, UnsupportedError
from ovm.image import apt
from ovm.image.images import (
    DESCRIPTION,
    FILE_NAMES,
    FORMAT,
    ZIPPED_ROOTFS,
    Arch,
    Description,
    GuestImage,
    ImageFile,
    load_image,
    sha256,
)
from ovm.image.place import check_target, into_place
from ovm.model import architectures
from ovm.model.architectures import ARCHITECTURES
from ovm.process.child import users_environment
from ovm.registry.images import image_hint
from ovm.text.redaction import shown_url, without_credentials
from ovm.trust import directories
from ovm.trust.locks import try_lock

ROOTFS_SIZE = "1G"
"""Size of the file system, not of its data. A multiple of 512, as virtio requires."""
SPACE_NEEDED_MIB = 1536
TERM_GRACE_S = 15.0
"""mmdebstrap has to unmount and to remove a tree."""
LOG_TAIL_LINES = 15

KERNEL_PACKAGES: Mapping[Arch, str] = {"amd64": "linux-image-cloud-amd64", "arm64": "linux-image-arm64"}
"""arm64's cloud kernel lacks KEYBOARD_GPIO, which the power button of a virtual machine requires."""
DEFAULT_SUITE = "trixie"
"""Of the images that are released, and the one that all tests use."""
_TOOLS = {"mmdebstrap": "mmdebstrap", "mkfs.btrfs": "btrfs-progs", "xz": "xz-utils", "setpriv": "util-linux"}
"""Programs that the build runs on the host, and their Debian packages."""
_KEYRINGS = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Not in an ordinary user's PATH on Debian."""

Progress = Callable[[str, str], None]
"""Called with the build's stage and a detail of it."""

_LEFT_OUT = ("doc", "info", "locale", "man")
_EMULATORS = ("bin/qemu-*", "libexec/qemu-binfmt/*", "share/qemu/binfmt.d/*")
_KEPT_DOCS = ("copyright", "changelog*")  # the licences; and the changelogs, whose dates bound those of the tree


def _emulator(arch: str) -> tuple[str, ...]:
    return f"bin/qemu-{arch}", f"libexec/qemu-binfmt/{arch}-binfmt-P", f"share/qemu/binfmt.d/qemu-{arch}.conf"


def _foreign(arch: Arch) -> str:
    """Return QEMU's name of the other architecture, whose emulator the guest keeps."""
    return next(other.machine for other in ARCHITECTURES if other.debian != arch)


def host_arch() -> Arch:
    """Return Debian's name of the host's architecture."""
    known = architectures.find(platform.machine())
    return known.debian if known else "amd64"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Contents and directory of the image to build."""

    arch: Arch = field(default_factory=host_arch)
    output: Path | None = None
    """The image's directory; by default the one that ovm starts machines from."""
    zip: bool = False
    """Also pack the rootfs as ``rootfs.btrfs.zip``."""
    suite: str = DEFAULT_SUITE
    """A release of Debian's; with ``mirror``, whatever suite is there."""
    mirror: str = ""
    """URL of Debian's archive; by default the one of the host's apt."""

    def __post_init__(self) -> None:
        if self.arch not in KERNEL_PACKAGES:
            raise OptionError(f"there is no guest for the architecture {self.arch!r}", hint="use amd64 or arm64")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.suite):
            raise OptionError(f"{self.suite!r} is not the name of a Debian suite")
        if not self.mirror and self.suite not in apt.RELEASES:
            raise OptionError(
                f"Debian has no release {self.suite!r}", hint="use trixie or forky, or name the archive with --mirror"
            )
        if self.mirror and not re.fullmatch(r"[a-z0-9+]+:/\S+", self.mirror):
            raise OptionError(f"{shown_url(self.mirror)!r} is not the URL of a Debian archive")


async def build_image(options: BuildOptions, *, progress: Progress | None = None) -> GuestImage:
    """Build a guest image and replace the existing one.

    When cancelled, it stops the programs it started, leaves nothing behind and keeps the existing image.

    Raises:
        ImageError: a step failed; has the stage, the exit reason and the log's last lines.
    """
    report = progress or (lambda _stage, _detail: None)
    environment = _environment()
    await asyncio.to_thread(_check_host, options.arch, environment["PATH"])
    target = paths.expanded(options.output or paths.images_dir() / f"default-{options.arch}").absolute()
    check_target(target)
    with _workspace(target) as work:
        if os.geteuid() == 0:  # in mmdebstrap's namespace the tree's owners may not enter this directory
            environment["TMPDIR"] = os.fspath(work)
        build = _Build(options, work, environment, report)
        try:
            await build.run()
        except ImageError:
            # keep the log of a failed build
            with contextlib.suppress(OSError):
                (work / "build.log").replace(_failed_log(target))
            raise
        into_place(work / "image", target)
    with contextlib.suppress(OSError):
        _failed_log(target).unlink()
    return load_image(target)


class _Build:
    """One build in its workspace."""

    def __init__(self, options: BuildOptions, work: Path, environment: dict[str, str], report: Progress) -> None:
        self.options = options
        self.work = work
        self.environment = environment
        self.report = report
        self.stage = "prepare"

    async def run(self) -> None:
        """Build the image in ``work/image``."""
        self.report(self.stage, f"Debian {self.options.suite} for {self.options.arch}")
        await asyncio.to_thread(pack_guest_files, self.work / "guest.tar")
        await self._spawn("install", await self._mmdebstrap())
        image = self.work / "image"
        image.mkdir()
        await self._spawn("unpack", ["tar", "--extract", "--file", "out.tar", "--directory", os.fspath(image)])
        (self.work / "out.tar").unlink()
        self._enter("describe", "computing digests")
        await asyncio.to_thread(describe, image, self.options)
        if self.options.zip:
            self._enter("zip", ZIPPED_ROOTFS)
            await asyncio.to_thread(_zip_rootfs, image)
        (self.work / "build.log").replace(image / "build.log")
        await asyncio.to_thread(_sync, image)

    def _enter(self, stage: str, detail: str) -> None:
        self.stage = stage
        self.report(stage, detail)

    async def _mmdebstrap(self) -> list[str]:
        options = self.options
        packages = [*guest_lines("packages"), KERNEL_PACKAGES[options.arch]]
        settings = apt.guest_settings(await self._apt_config(), os.environ)
        sources = [options.mirror] if options.mirror else apt.guest_sources(_host_sources(), options.suite)
        # fmt: off
        return [
            # it ends with this process, even if this process is killed
            "setpriv", "--pdeathsig", "TERM",
            "mmdebstrap", "--variant=minbase", "--format=null", f"--architectures={options.arch}",
            f"--include={','.join(packages)}", f"--keyring={_keyring()}",
            '--aptopt=APT::Install-Recommends "false"', *(f"--aptopt={setting}" for setting in settings),
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _LEFT_OUT),
            *(f"--dpkgopt=path-include=/usr/share/doc/*/{name}" for name in _KEPT_DOCS),
            *(f"--dpkgopt=path-exclude=/usr/{pattern}" for pattern in _EMULATORS),
            *(f"--dpkgopt=path-include=/usr/{path}" for path in _emulator(_foreign(options.arch))),
            "--customize-hook=tar-in guest.tar /",
            f'--customize-hook=sh "$1/.ovm/finish" "$1" {ROOTFS_SIZE}',
            "--customize-hook=download /.ovm/out.tar out.tar",
            "--skip=cleanup", options.suite, "-", *sources,
        ]
        # fmt: on

    async def _apt_config(self) -> str:
        if not shutil.which("apt-config", path=self.environment["PATH"]):
            return ""
        process = await asyncio.create_subprocess_exec(
            "apt-config", "dump", env=self.environment, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
        )
        output, _ = await process.communicate()
        return output.decode(errors="replace")

    async def _spawn(self, stage: str, command: Sequence[str]) -> None:
        """Run a program to its end; log its output and report its progress."""
        self._enter(stage, command[0] if stage != "install" else "mmdebstrap")
        with (self.work / "build.log").open("ab") as log:
            log.write(without_credentials(f"+ {' '.join(command)}\n").encode())
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.work,
                env=self.environment,
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                start_new_session=True,
            )
            try:
                assert process.stdout is not None
                async for output in process.stdout:
                    line = without_credentials(output.decode(errors="replace"))
                    log.write(line.encode())
                    log.flush()
                    self._listen(line.strip())
                status = await process.wait()
            finally:
                await _end(process)
        if status != 0:
            raise ImageError(
                f"{'mmdebstrap' if stage == 'install' else command[0]} failed",
                hint="read the whole log, a file beside the image's directory that ends in .build.log",
                stage=self.stage,
                exit_reason=f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}",
                log_tail=tuple(_tail(self.work / "build.log")),
            )

    def _listen(self, line: str) -> None:
        if line.startswith("ovm: "):
            stage, _, detail = line.removeprefix("ovm: ").partition(" ")
            self._enter(stage, detail)
        elif line.startswith("I: "):
            self.report(self.stage, line.removeprefix("I: "))


async def _end(process: asyncio.subprocess.Process) -> None:
    """Stop a program and its children; do nothing if it has ended."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(TERM_GRACE_S):
            await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def describe(image: Path, options: BuildOptions) -> Description:
    """Write ``image.json`` from the notes of ``guest/finish``."""
    packages = dict(line.split(" ", 1) for line in (image / "packages").read_text("utf-8").splitlines())
    files = {name: _describe_file(image / file) for name, file in FILE_NAMES.items()}
    description = Description(
        format=FORMAT,
        guest="ovm",
        arch=options.arch,
        suite=options.suite,
        versions={name: packages[name] for name in ("podman", "crun", "netavark", "systemd") if name in packages}
        | {"kernel": (image / "kernel-version").read_text("utf-8").strip()},
        tree_sha256=sha256(image / "manifest"),
        packages=dict(sorted(packages.items())),
        files=files,
    )
    for name in ("packages", "kernel-version"):
        (image / name).unlink()
    text = msgspec.json.format(msgspec.json.encode(description), indent=1)
    (image / DESCRIPTION).write_bytes(text + b"\n")
    return description


def _describe_file(path: Path) -> ImageFile:
    status = path.stat()
    occupied = status.st_blocks * 512
    return ImageFile(sha256=sha256(path), size=status.st_size, data_bytes=occupied if occupied < status.st_size else 0)


def _zip_rootfs(image: Path) -> None:
    name = FILE_NAMES["rootfs"]
    built = datetime.fromtimestamp((image / name).stat().st_mtime, UTC)
    entry = zipfile.ZipInfo(name, built.timetuple()[:6])
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    with zipfile.ZipFile(image / ZIPPED_ROOTFS, "w") as archive:
        with (image / name).open("rb") as source, archive.open(entry, "w", force_zip64=False) as member:
            shutil.copyfileobj(source, member, 1 << 20)


# The guest's files


def guest_files() -> Iterator[tuple[str, bytes]]:
    """Yield the guest's own files, which are package data: relative name and content, sorted."""

    def walk(directory: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
        for entry in sorted(directory.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir():
                yield from walk(entry, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry.read_bytes()

    return walk(resources.files("ovm.image") / "guest", "")


def guest_lines(name: str) -> list[str]:
    """Return the entries of one of the guest's lists."""
    text = (resources.files("ovm.image") / "guest" / name).read_text("utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pack_guest_files(archive: Path) -> None:
    """Pack the guest's files in a tar, which mmdebstrap unpacks into the tree, readable by the user who builds."""
    with tarfile.open(archive, "w") as tar:
        for name, content in guest_files():
            entry = tarfile.TarInfo(f".ovm/{name}")
            entry.size = len(content)
            entry.mode = 0o644
            tar.addfile(entry, io.BytesIO(content))


# The host


def _environment() -> dict[str, str]:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])
    # INITRD: Debian's own initrd would be discarded. LC_ALL: the builder parses the output
    return users_environment() | {"PATH": path, "INITRD": "No", "LC_ALL": "C.UTF-8"}


def _check_host(arch: Arch, path: str) -> None:
    if sys.platform != "linux":
        raise UnsupportedError("guest images are built on Linux only", hint=image_hint())
    missing = [package for tool, package in _TOOLS.items() if not shutil.which(tool, path=path)]
    if missing:
        raise ImageError(
            "programs the build requires are missing", hint=f"run apt-get install {' '.join(sorted(missing))}"
        )
    _keyring()
    if arch != host_arch():
        _check_foreign(arch, path)


def _check_foreign(arch: Arch, path: str) -> None:
    """Refuse an architecture whose programs this host cannot run, by the same arch-test that mmdebstrap runs."""
    arch_test = shutil.which("arch-test", path=path)
    if arch_test is None or subprocess.run([arch_test, arch], capture_output=True, check=False).returncode != 0:
        raise ImageError(
            f"this host cannot run programs for {arch}",
            hint="run apt-get install qemu-user-static binfmt-support arch-test (Debian 13: qemu-user-binfmt "
            "arch-test); if /proc/sys/fs/binfmt_misc is empty, run mount -t binfmt_misc none /proc/sys/fs/binfmt_misc, "
            "then update-binfmts --enable",
        )


def _keyring() -> Path:
    for name in _KEYRINGS:
        if (keyring := Path("/usr/share/keyrings") / name).exists():
            return keyring
    raise ImageError("Debian's archive keys are missing", hint="run apt-get install debian-archive-keyring")


def _host_sources() -> list[apt.Source]:
    return apt.host_sources(Path("/etc/apt"))


# The workspace


def _failed_log(target: Path) -> Path:
    return target.with_name(f"{target.name}.build.log")


@contextlib.contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """Create a hidden directory beside the target, locked while the build runs; remove those of killed builds."""
    directories.make(target.parent)
    prefix = f".{target.name}.building-"
    for leftover in target.parent.glob(f"{prefix}*"):
        _remove_unless_locked(leftover)
    if (free := shutil.disk_usage(target.parent).free >> 20) < SPACE_NEEDED_MIB:
        raise SpaceError(f"{target.parent} has {free} MiB free, a build requires {SPACE_NEEDED_MIB}")
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with (work / "lock").open("w") as lock:
            try_lock(lock.fileno())  # no other process knows of it yet
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_unless_locked(leftover: Path) -> None:
    try:
        with (leftover / "lock").open("a") as lock:
            if try_lock(lock.fileno()):  # else another build of the same image runs; the last to finish wins
                shutil.rmtree(leftover, ignore_errors=True)
    except OSError:
        shutil.rmtree(leftover, ignore_errors=True)


def _sync(image: Path) -> None:
    for path in (*image.iterdir(), image):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _tail(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-LOG_TAIL_LINES:]
