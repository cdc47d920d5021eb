"""Check before a start that this Mac and its programs can run a machine.

Otherwise the failure would show as vfkit's "exit status 1", or as a guest that never sends a message.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ovm.errors import HelperError, UnsupportedError
from ovm.process.probe import Version, probe_output, show_version

log = logging.getLogger(__name__)

OLDEST: Version = (13,)
"""Oldest macOS that vfkit supports since 0.6.2, and the first with Rosetta for Linux."""
LINUX_6_12_SINCE: Version = (15, 5)
"""On older versions, Apple's framework cannot boot Linux 6.12 and newer on Intel, which use protection keys."""
WITHOUT_PROTECTION_KEYS = "nopku"
"""Kernel parameter with which they boot there anyway."""

ENTITLEMENT = "com.apple.security.virtualization"
QUARANTINE = "com.apple.quarantine"
CODESIGN = Path("/usr/bin/codesign")
XATTR = Path("/usr/bin/xattr")

_USER_APPROVED = 0x40
_SHOWN_LINES = 5
_BZIMAGE_MAGIC = slice(0x202, 0x206)
_BZIMAGE_VERSION_POINTER = slice(0x20E, 0x210)
_BZIMAGE_SETUP = 0x200
_BZIMAGE_HEAD_BYTES = _BZIMAGE_SETUP + 0x10000 + 64


@dataclass(frozen=True, slots=True)
class MacHost:
    """A Mac, as this Python process sees it."""

    arch: str
    """Architecture as named by ``platform.machine()``."""
    version: Version
    """Version of macOS; empty if unknown."""
    translated: bool = False
    """Whether this Python is an Intel program on an Apple chip."""


def this_host() -> MacHost:
    """Describe this Mac."""
    name = os.uname()
    translated = name.machine == "x86_64" and "ARM64" in name.version
    return MacHost(name.machine, macos_version(platform.mac_ver()[0]), translated)


def macos_version(told: str) -> Version:
    """Parse the version that macOS reports to a program.

    macOS reports 10.16 instead of 11 or later to programs built for an older system, so 10.16 means unknown. It reports
    16 instead of 26.
    """
    if not re.fullmatch(r"\d+(\.\d+)*", told):
        return ()
    major, *rest = map(int, told.split("."))
    if (major, *rest[:1]) == (10, 16):
        return ()
    return (26 if major == 16 else major, *rest)


async def preflight(
    vfkit: Path,
    gvproxy: Path,
    kernel: Path,
    *,
    rosetta: bool,
    cmdline: str = "",
    host: MacHost | None = None,
    codesign: Path = CODESIGN,
    xattr: Path = XATTR,
) -> None:
    """Reject what cannot run on ``host``, by default this Mac. Does nothing on other systems.

    ``cmdline`` is the addition to the kernel's command line.

    Raises:
        UnsupportedError: this Mac, or its version of macOS, cannot run such a machine.
        HelperError: macOS does not allow one of the programs to run.
    """
    if host is None:
        if sys.platform != "darwin":
            return
        host = this_host()
    check_host(host, rosetta=rosetta)
    check_kernel_on_host(host, await asyncio.to_thread(linux_version, kernel), cmdline=cmdline)
    await check_program(vfkit, entitled=True, codesign=codesign, xattr=xattr)
    await check_program(gvproxy, entitled=False, codesign=codesign, xattr=xattr)


def check_host(host: MacHost, *, rosetta: bool) -> None:
    """Reject a Mac that cannot run vfkit, or Rosetta for Linux if requested.

    Raises:
        UnsupportedError: the Mac does not meet a requirement.
    """
    if host.translated:
        raise UnsupportedError(
            "this Python is an Intel program on an Apple chip; programs that it starts are translated, too, "
            "and macOS runs no virtual machines for translated programs",
            hint="use a Python for arm64",
        )
    if host.version and host.version < OLDEST:
        raise UnsupportedError(
            f"this is macOS {show_version(host.version)}; vfkit needs {show_version(OLDEST)} or newer",
            hint="update macOS",
        )
    if rosetta and host.arch != "arm64":
        raise UnsupportedError(
            f"rosetta runs Intel programs on Apple chips, and this Mac is {host.arch}", hint="remove the option rosetta"
        )


def check_kernel_on_host(host: MacHost, linux: Version | None, *, cmdline: str = "") -> None:
    """Reject a kernel that hangs before its first message on this Mac; one of unknown version is accepted.

    Raises:
        UnsupportedError: this macOS cannot boot this version of Linux.
    """
    if host.arch != "x86_64" or not host.version or host.version >= LINUX_6_12_SINCE:
        return
    if linux is None or linux < (6, 12) or WITHOUT_PROTECTION_KEYS in cmdline.split():
        return
    raise UnsupportedError(
        f"Linux {show_version(linux)} does not boot on an Intel Mac before macOS {show_version(LINUX_6_12_SINCE)}, "
        f"and this is {show_version(host.version)}",
        hint=f'update macOS, or use kernel_cmdline="{WITHOUT_PROTECTION_KEYS}"',
    )


def linux_version(kernel: Path) -> Version | None:
    """Read the version from a bzImage's header; ``None`` if it has none or the file is not a bzImage."""
    try:
        with kernel.open("rb") as opened:
            head = opened.read(_BZIMAGE_HEAD_BYTES)
    except OSError:
        return None
    pointer = int.from_bytes(head[_BZIMAGE_VERSION_POINTER], "little")
    if head[_BZIMAGE_MAGIC] != b"HdrS" or not pointer:
        return None
    found = re.match(rb"(\d{1,4})\.(\d{1,4})", head[_BZIMAGE_SETUP + pointer :])
    return (int(found[1]), int(found[2])) if found else None


async def check_program(path: Path, *, entitled: bool, codesign: Path = CODESIGN, xattr: Path = XATTR) -> None:
    """Reject a program that macOS does not allow to run.

    macOS blocks a quarantined program: it was downloaded, and its user has not approved it. ovm does not remove the
    quarantine attribute, because that would be the user's approval. Clones keep the attribute but copies do not, so ovm
    checks the origin. If the program must be ``entitled`` to virtualize, ovm checks its signature, too.

    If the tools for these checks are missing or fail, the program is accepted.

    Raises:
        HelperError: macOS blocks the program; ``log_tail`` holds the tool's output.
    """
    said = await _answer([xattr, "-p", QUARANTINE, path])
    if said is not None and is_quarantined(said):
        raise HelperError(
            f"{path} was downloaded, and macOS blocks it until you approve it",
            hint=f"run this if you trust it: xattr -d {QUARANTINE} {path}",
            log_tail=_shown(said),
        )
    if not entitled or await asyncio.to_thread(_is_script, path):  # a script's signature does not cover what it runs
        return
    said = await _answer([codesign, "-d", "--entitlements", "-", "--xml", path])
    if said is not None and not is_entitled(said):
        raise HelperError(
            f"{path} is not signed for virtualization, so macOS does not allow it to run a machine",
            hint="reinstall it: a changed file loses its signature, which holds the entitlement",
            log_tail=_shown(said),
        )


def is_quarantined(said: str) -> bool:
    """Return whether ``xattr -p`` printed a quarantine that the user has not approved."""
    mark = re.search(r"(?m)^([0-9a-fA-F]{4});", said)
    return mark is not None and not int(mark[1], 16) & _USER_APPROVED


def is_entitled(said: str) -> bool:
    """Return whether the output of ``codesign -d --entitlements - --xml`` holds the entitlement to virtualize."""
    import plistlib
    from xml.parsers.expat import ExpatError

    xml = re.search(r"(?:<\?xml|<plist).*</plist>", said, re.DOTALL)
    if xml is None:
        return False
    try:
        entitlements = plistlib.loads(xml[0].encode(), fmt=plistlib.FMT_XML)
    except (ExpatError, plistlib.InvalidFileException, ValueError):
        return False
    return isinstance(entitlements, dict) and entitlements.get(ENTITLEMENT) is True


async def _answer(argv: list[Path | str]) -> str | None:
    try:
        return await probe_output(argv)
    except HelperError as error:
        log.debug("not checked: %s", error.message)
        return None


def _is_script(path: Path) -> bool:
    with path.open("rb") as opened:
        return opened.read(2) == b"#!"


def _shown(said: str) -> tuple[str, ...]:
    return tuple(said.splitlines()[:_SHOWN_LINES])
