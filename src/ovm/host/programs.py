"""The helper programs found on this host: gvproxy, QEMU and virtiofsd, or vfkit.

They are looked for on ``PATH`` and where distributions, podman, Homebrew and MacPorts put them; the first
one that is new enough is taken.
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
"""The Rust virtiofsd is at 1.x; the C one carries QEMU's version and went away with QEMU 8."""


@dataclass(frozen=True, slots=True)
class Helper:
    """A program that will do."""

    path: Path
    version: Version

    @property
    def flavour(self) -> Flavour:
        """Of virtiofsd: ``c`` is the old one from QEMU, which enforces no read-only and wants root."""
        return "c" if self.version >= _FIRST_C_VERSION else "rust"

    def __str__(self) -> str:
        return f"{self.path} ({show_version(self.version)})"


def own_bin_dir() -> Path:
    """Where the project's set-up puts helpers that the system does not have."""
    return paths.home() / "bin"


async def find_gvproxy() -> Helper:
    """The gvproxy to use.

    Raises:
        HelperError: there is none, or only one that is too old.
    """
    return await _first(GVPROXY, "gvproxy", [own_bin_dir(), *map(Path, _GVPROXY_DIRS)])


async def find_vfkit() -> Helper:
    """The vfkit to use.

    Raises:
        HelperError: there is none, or only one that is too old.
    """
    return await _first(VFKIT, "vfkit", [own_bin_dir(), *map(Path, _VFKIT_DIRS)])


async def find_qemu(arch: str) -> Helper:
    """The QEMU that runs guests of ``arch`` (``amd64`` or ``arm64``).

    Raises:
        UnsupportedError: there is no guest for that architecture.
        HelperError: there is none, or only one that is too old.
    """
    if (known := architectures.find(arch)) is None:
        raise UnsupportedError(f"there is no guest for the architecture {arch!r}", hint="amd64 and arm64 are known")
    return await _first(QEMU, known.qemu, map(Path, _QEMU_DIRS))


async def find_virtiofsd() -> Helper:
    """The virtiofsd to use; the Rust one where both are there, unless ``PATH`` says otherwise.

    Raises:
        HelperError: there is none that works.
    """
    return await _first(VIRTIOFSD, "virtiofsd", map(Path, _VIRTIOFSD_DIRS))


async def _first(program: Program, file_name: str, directories: Iterable[Path]) -> Helper:
    """The first candidate that will do; if none does, the error says what is wrong with each."""
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
        raise HelperError(f"{what} is not on this machine", hint=program.hint)
    raise HelperError(f"no usable {what} on this machine", hint=program.hint, log_tail=tuple(refused))


def _candidates(file_name: str, directories: Iterable[Path]) -> Iterable[Path]:
    """Existing files of that name, ``PATH`` first, each once however many links lead to it."""
    on_path = shutil.which(file_name)
    seen: set[Path] = set()
    for path in ([Path(on_path)] if on_path else []) + [directory / file_name for directory in directories]:
        if path.is_file() and (real := path.resolve()) not in seen:
            seen.add(real)
            yield path
