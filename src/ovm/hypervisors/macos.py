"""Whether this Mac and the programs on it can run a machine, told before anything is started.

Found out later it would be vfkit's "exit status 1", or a guest that never says a word.
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
"""What vfkit is built for since 0.6.2; Rosetta for Linux came with it, too."""
LINUX_6_12_SINCE: Version = (15, 5)
"""Before it, Apple's framework did not let Linux 6.12 and newer boot on Intel: they use protection keys."""
WITHOUT_PROTECTION_KEYS = "nopku"
"""A word of the kernel's command line with which they boot there all the same."""

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
    """A Mac, as this Python sees it."""

    arch: str
    """As ``platform.machine()`` names it."""
    version: Version
    """Of macOS; empty if it cannot be told."""
    translated: bool = False
    """Whether this Python is an Intel program on an Apple chip."""


def this_host() -> MacHost:
    """The Mac this runs on."""
    name = os.uname()
    translated = name.machine == "x86_64" and "ARM64" in name.version
    return MacHost(name.machine, macos_version(platform.mac_ver()[0]), translated)


def macos_version(told: str) -> Version:
    """The version of macOS, from what it tells a program.

    Programs made for an older system are told 10.16 instead of 11 or any later one, which says nothing, and 16
    instead of 26.
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
    """Refuse what cannot run on ``host``, this Mac if not given. On another system there is nothing to ask.

    ``cmdline`` is what is added to the kernel's command line.

    Raises:
        UnsupportedError: this Mac, or its version of macOS, cannot run such a machine.
        HelperError: macOS would not let one of the programs do its work.
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
    """Refuse a Mac that vfkit, or Rosetta for Linux, does not run on.

    Raises:
        UnsupportedError: says what is missing.
    """
    if host.translated:
        raise UnsupportedError(
            "this Python is an Intel program on an Apple chip; what it starts is translated like itself, "
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
            f"rosetta runs Intel programs on Apple chips, and this Mac is {host.arch}", hint="leave it out"
        )


def check_kernel_on_host(host: MacHost, linux: Version | None, *, cmdline: str = "") -> None:
    """Refuse a kernel that crashes on this Mac before its first boot message; one of unknown version is tried.

    Raises:
        UnsupportedError: says which versions do not go together, and what helps.
    """
    if host.arch != "x86_64" or not host.version or host.version >= LINUX_6_12_SINCE:
        return
    if linux is None or linux < (6, 12) or WITHOUT_PROTECTION_KEYS in cmdline.split():
        return
    raise UnsupportedError(
        f"Linux {show_version(linux)} does not boot on an Intel Mac before macOS {show_version(LINUX_6_12_SINCE)}, "
        f"and this is {show_version(host.version)}",
        hint=f'update macOS, or give kernel_cmdline="{WITHOUT_PROTECTION_KEYS}"',
    )


def linux_version(kernel: Path) -> Version | None:
    """The version in a bzImage's header; ``None`` of anything else, or where it is not told."""
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
    """Refuse a program that macOS would not let do its work.

    That is one in quarantine: it came from the network, and nobody has yet told macOS that it may run. The mark is
    left for its owner to remove: to take it off silently would be to answer in the user's name. Copies do not bear
    it (clones do), so it is the origin that is asked. Where the program must be ``entitled`` to virtualize, its
    signature is asked, too.

    Where the tools for it are missing, or do not answer, nothing is refused.

    Raises:
        HelperError: says why, with what the tool printed.
    """
    said = await _answer([xattr, "-p", QUARANTINE, path])
    if said is not None and is_quarantined(said):
        raise HelperError(
            f"{path} came from the network, and macOS does not let it run before you do",
            hint=f"if you trust it: xattr -d {QUARANTINE} {path}",
            log_tail=_shown(said),
        )
    if not entitled or await asyncio.to_thread(_is_script, path):  # a script's signature says nothing of what it runs
        return
    said = await _answer([codesign, "-d", "--entitlements", "-", "--xml", path])
    if said is not None and not is_entitled(said):
        raise HelperError(
            f"{path} is not signed for virtualization, so macOS would not let it run a machine",
            hint="install it again: the entitlement is in its signature, which a changed file loses",
            log_tail=_shown(said),
        )


def is_quarantined(said: str) -> bool:
    """Whether ``xattr -p`` printed a mark that its user has not lifted."""
    mark = re.search(r"(?m)^([0-9a-fA-F]{4});", said)
    return mark is not None and not int(mark[1], 16) & _USER_APPROVED


def is_entitled(said: str) -> bool:
    """Whether ``codesign -d --entitlements - --xml`` printed the right to virtualize, among whatever else."""
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
