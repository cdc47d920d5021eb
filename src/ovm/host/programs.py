"""Find the helper programs on this host: gvproxy, QEMU and virtiofsd, or vfkit.

They are searched on ``PATH`` and in the directories of distributions, podman, Homebrew and MacPorts. The first one
that is new enough is used.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovm import paths
from ovm.errors import FileError, HelperError, UnsupportedError
from ovm.model import architectures
from ovm.process.probe import GVPROXY, QEMU, VFKIT, VIRTIOFSD, Program, Version, check_helper, show_version
from ovm.trust import directories as trust

Flavour = Literal["rust", "c"]

_GVPROXY_DIRS = (
    "/usr/libexec/podman",
    "/usr/lib/podman",
    "/usr/local/libexec/podman",
    "/usr/local/lib/podman",
    "/opt/homebrew/opt/podman/libexec/podman",
    "/opt/homebrew/bin",
    "/usr/local/opt/podman/libexec/podman",
    "/opt/podman/bin",
    "/opt/local/libexec",
    "/opt/local/libexec/podman",
    "/opt/local/bin",
    "/usr/local/bin",
    "/usr/bin",
)
_VFKIT_DIRS = (
    "/opt/homebrew/bin",
    "/usr/local/bin",
    "/opt/homebrew/opt/podman/libexec/podman",
    "/usr/local/opt/podman/libexec/podman",
    "/opt/podman/bin",
    "/opt/local/bin",
)
_QEMU_DIRS = ("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin", "/opt/local/bin")
_VIRTIOFSD_DIRS = ("/usr/libexec", "/usr/lib", "/usr/lib/virtiofsd", "/usr/local/libexec", "/usr/lib/qemu")
_FIRST_C_VERSION = (2,)
"""The Rust virtiofsd has version 1.x; the C one has QEMU's version, and QEMU 8 removed it."""


@dataclass(frozen=True, slots=True)
class Helper:
    """A usable program."""

    path: Path
    version: Version

    @property
    def flavour(self) -> Flavour:
        """Implementation of virtiofsd: ``c`` is QEMU's old one, which does not enforce read-only and requires root."""
        return "c" if self.version >= _FIRST_C_VERSION else "rust"

    def __str__(self) -> str:
        return f"{self.path} ({show_version(self.version)})"


def own_bin_dir() -> Path:
    """Return the directory where the project's setup installs missing helper programs."""
    return paths.home() / "bin"


async def find_gvproxy() -> Helper:
    """Find gvproxy.

    Raises:
        HelperError: it is missing or too old.
    """
    return await _first(GVPROXY, "gvproxy", [own_bin_dir(), *map(Path, _GVPROXY_DIRS)])


async def find_vfkit() -> Helper:
    """Find vfkit.

    Raises:
        HelperError: it is missing or too old.
    """
    return await _first(VFKIT, "vfkit", [own_bin_dir(), *map(Path, _VFKIT_DIRS)])


async def find_qemu(arch: str) -> Helper:
    """Find the QEMU that runs guests of ``arch`` (``amd64`` or ``arm64``).

    Raises:
        UnsupportedError: ovm has no guest for that architecture.
        HelperError: it is missing or too old.
    """
    if (known := architectures.find(arch)) is None:
        raise UnsupportedError(f"there is no guest for the architecture {arch!r}", hint="use amd64 or arm64")
    return await _first(QEMU, known.qemu, map(Path, _QEMU_DIRS))


async def find_virtiofsd() -> Helper:
    """Find virtiofsd; prefers the one on ``PATH``, then the Rust one.

    Raises:
        HelperError: none works.
    """
    return await _first(VIRTIOFSD, "virtiofsd", map(Path, _VIRTIOFSD_DIRS))


async def _first(program: Program, file_name: str, directories: Iterable[Path]) -> Helper:
    """Return the first usable candidate. If none is usable, the error has the reason for each."""
    refused: list[str] = []
    for path in _candidates(file_name, directories):
        try:
            if path.parent == own_bin_dir():
                await asyncio.to_thread(trust.check, path.parent)
            return Helper(path, await check_helper(path, program))
        except (HelperError, FileError) as error:
            refused += [error.message, *error.log_tail]
    what = file_name if program.name == file_name else f"{program.name} ({file_name})"
    if not refused:
        raise HelperError(f"{what} is not installed on this host", hint=program.hint)
    raise HelperError(f"no usable {what} on this host", hint=program.hint, log_tail=tuple(refused))


def _candidates(file_name: str, directories: Iterable[Path]) -> Iterable[Path]:
    """Yield existing files of that name, ``PATH`` first, each once even if several links have it as target."""
    on_path = shutil.which(file_name)
    seen: set[Path] = set()
    for path in ([Path(on_path)] if on_path else []) + [directory / file_name for directory in directories]:
        if path.is_file() and (real := path.resolve()) not in seen:
            seen.add(real)
            yield path
