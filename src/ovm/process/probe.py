"""Outside programs: which version a given one is, and whether that will do.

Where to look for them is not known here; see ``ovm.helpers``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ovm.errors import HelperError
from ovm.process.child import clean_environment

PROBE_TIMEOUT_S = 10.0
"""A program that has not told its version by then hangs; loaded machines need a second or two."""

_SHOWN_LINES = 5

Version = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """An outside program: how it tells its version, and the oldest one that will do."""

    name: str
    argument: str
    """What makes it print its version and exit."""
    pattern: str
    """A regular expression whose group 1 is the version in what it prints."""
    minimum: Version
    hint: str
    """How to get it."""


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


def show_version(version: Version) -> str:
    """``(0, 8, 9)`` as people write it."""
    return ".".join(map(str, version))


def parse_version(text: str, pattern: str) -> Version | None:
    """The numbers of the version that group 1 of ``pattern`` finds in ``text``; None if it finds none."""
    found = re.search(pattern, text)
    return tuple(int(part) for part in found[1].split(".")) if found else None


async def probe_output(argv: Sequence[str | Path], *, timeout: float = PROBE_TIMEOUT_S) -> str:
    """What a program that ends by itself prints, on both of its outputs.

    Nothing of it is left running, whether it hangs or the caller is cancelled.

    Raises:
        HelperError: it cannot be run, or is not done in time.
    """
    program = os.fspath(argv[0])
    try:
        process = await asyncio.create_subprocess_exec(
            *(os.fspath(part) for part in argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=clean_environment(),
            start_new_session=True,  # so that what it started ends with it
        )
    except OSError as error:
        raise HelperError(f"{program} cannot be run: {error.strerror or error}") from error
    try:
        async with asyncio.timeout(timeout):
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise HelperError(f"{program} did not answer to {argv[1:]} within {timeout:g} s") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return output.decode(errors="replace")


async def probe_version(argv: Sequence[str | Path], pattern: str, *, timeout: float = PROBE_TIMEOUT_S) -> Version:
    """The version that the program started as ``argv`` prints, as numbers.

    Raises:
        HelperError: it cannot be run, hangs, or prints nothing that ``pattern`` finds a version in.
    """
    output = await probe_output(argv, timeout=timeout)
    return _version_in(output, pattern, argv[0])


async def check_helper(path: Path, program: Program, *, timeout: float = PROBE_TIMEOUT_S) -> Version:
    """The version of the ``program`` that lies at ``path``.

    Raises:
        HelperError: it is not there, not executable, something else, or too old.
    """
    _check_executable(path, program)
    try:
        version = await probe_version([path, program.argument], program.pattern, timeout=timeout)
    except HelperError as error:
        error.hint = error.hint or program.hint
        raise
    if version < program.minimum:
        raise HelperError(
            f"{path} is {program.name} {show_version(version)}; {show_version(program.minimum)} or newer is needed",
            hint=program.hint,
        )
    return version


def _check_executable(path: Path, program: Program) -> None:
    if not path.is_file():
        raise HelperError(f"{program.name}: {path} is not a file", hint=program.hint)
    if not os.access(path, os.X_OK):
        raise HelperError(f"{program.name}: {path} is not executable", hint=f"chmod +x {path}")


def _version_in(output: str, pattern: str, program: str | Path) -> Version:
    if (version := parse_version(output, pattern)) is None:
        raise HelperError(
            f"{os.fspath(program)} does not tell its version, so it is not the program it is taken for",
            log_tail=tuple(output.splitlines()[:_SHOWN_LINES]),
        )
    return version
