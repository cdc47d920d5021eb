"""External programs: check that a given one has a supported version.

``ovm.host.programs`` finds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ovm.errors import HelperError
from ovm.process.child import clean_environment

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 10.0
"""Timeout of a program that prints its version; on a busy host it needs a second or two."""

OUTPUT_MAX_BYTES = 16 << 20
"""A program that prints more is killed; the certificates of a Mac are less."""
_SHOWN_LINES = 5
_READ_BYTES = 64 * 1024

_VERSION_MAX_CHARACTERS = 40

Version = tuple[int, ...]
"""Its numbers; empty for a build without version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """An external program: how to query its version, and the oldest supported one."""

    name: str
    argument: str
    """Argument with which it prints its version and exits."""
    pattern: str
    """Regular expression for its output; group 1 is the version."""
    minimum: Version
    hint: str
    """How to install it."""
    reason: str = ""
    """Fault of older versions."""
    unversioned: str | None = None
    """Regular expression for the output of a build without version, which is accepted."""


GVPROXY = Program(
    name="gvproxy",
    argument="-version",
    pattern=r"gvproxy version v?(\d+(?:\.\d+)*)",
    minimum=(0, 8, 1),
    hint="install the package gvproxy (Debian 13) or podman (Homebrew), "
    "or with Go 1.25: go install github.com/containers/gvisor-tap-vsock/cmd/gvproxy@v0.8.9",
)
QEMU = Program(
    name="QEMU",
    argument="--version",
    pattern=r"QEMU emulator version (\d+(?:\.\d+)*)",
    minimum=(7, 2),
    hint="install the package qemu-system-x86 (x86_64) or qemu-system-arm (arm64)",
)
VIRTIOFSD = Program(
    name="virtiofsd",
    argument="--version",
    pattern=r"virtiofsd (?:version |backend )?v?(\d+(?:\.\d+)*)",
    minimum=(1, 0),
    hint="install the package virtiofsd (on Debian 12: qemu-system-common)",
)
VFKIT = Program(
    name="vfkit",
    argument="--version",
    pattern=r"(?m)^vfkit version:\s*v?(\d+\.\d+\.\d+)",
    minimum=(0, 6, 2),
    hint="install vfkit or podman with Homebrew (brew install vfkit) or MacPorts, or podman's own package for macOS",
    reason="on SIGTERM, older versions cut the guest's power",
    # built without its makefile, or from a clone without tags
    unversioned=r"(?m)^vfkit version:[ \t]*(unknown|[0-9a-f]{7,40}(-dirty)?)?[ \t]*$",
)


def show_version(version: Version) -> str:
    """Return ``(0, 8, 9)`` as ``0.8.9``."""
    return ".".join(map(str, version)) or "unknown"


def parse_version(text: str, pattern: str) -> Version | None:
    """Return the version that group 1 of ``pattern`` finds in ``text``; ``None`` if it finds none."""
    found = re.search(pattern, text)
    if found is None or len(found[1]) > _VERSION_MAX_CHARACTERS:
        return None
    return tuple(int(part) for part in found[1].split("."))


async def probe_output(argv: Sequence[str | Path], *, timeout: float = PROBE_TIMEOUT_S) -> str:
    """Run a program that ends by itself; return its standard output and error.

    It is killed with its children if it hangs or the caller is cancelled.

    Raises:
        HelperError: it cannot be run, or does not end in time.
    """
    program = os.fspath(argv[0])
    try:
        process = await asyncio.create_subprocess_exec(
            *(os.fspath(part) for part in argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=clean_environment(),
            start_new_session=True,  # so that its children are killed with it
        )
    except OSError as error:
        raise HelperError(f"{program} cannot be run: {error.strerror or error}") from error
    try:
        async with asyncio.timeout(timeout):
            output = await _read(process, program)
            await process.wait()
    except TimeoutError as error:
        raise HelperError(f"{program} {' '.join(map(str, argv[1:]))} did not end within {timeout:g} s") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return output.decode(errors="replace")


async def _read(process: asyncio.subprocess.Process, program: str) -> bytes:
    assert process.stdout is not None
    output = bytearray()
    while piece := await process.stdout.read(_READ_BYTES):
        output += piece
        if len(output) > OUTPUT_MAX_BYTES:
            raise HelperError(f"{program} printed more than {OUTPUT_MAX_BYTES} bytes")
    return bytes(output)


async def check_helper(path: Path, program: Program, *, timeout: float = PROBE_TIMEOUT_S) -> Version:
    """Return the version of the ``program`` at ``path``; empty for a build without version.

    Raises:
        HelperError: it is missing, not executable, another program, or too old.
    """
    _check_executable(path, program)
    try:
        output = await probe_output([path, program.argument], timeout=timeout)
        if program.unversioned is not None and re.search(program.unversioned, output):
            log.warning("%s is a build of %s without a version number", path, program.name)
            return ()
        version = _version_in(output, program.pattern, path)
    except HelperError as error:
        error.hint = error.hint or program.hint
        raise
    if version < program.minimum:
        needed = f"{show_version(program.minimum)} or newer is required"
        raise HelperError(
            f"{path} is {program.name} {show_version(version)}; "
            + (f"{needed}: {program.reason}" if program.reason else needed),
            hint=program.hint,
        )
    return version


def _check_executable(path: Path, program: Program) -> None:
    if not path.is_file():
        raise HelperError(f"{program.name}: {path} is not a file", hint=program.hint)
    if not os.access(path, os.X_OK):
        raise HelperError(f"{program.name}: {path} is not executable", hint=f"run chmod +x {path}")


def _version_in(output: str, pattern: str, program: str | Path) -> Version:
    if (version := parse_version(output, pattern)) is None:
        raise HelperError(
            f"{os.fspath(program)} does not print its version, so it may be another program",
            log_tail=tuple(output.splitlines()[:_SHOWN_LINES]),
        )
    return version
