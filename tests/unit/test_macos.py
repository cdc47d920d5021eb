"""What a Mac would refuse is refused first, with the reason. The tools of macOS are scripts that print what they do."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ovm.errors import HelperError, UnsupportedError
from ovm.hypervisors import macos
from ovm.hypervisors.macos import MacHost

APPLE = MacHost("arm64", (14, 7, 1))
INTEL = MacHost("x86_64", (14, 7, 1))

DOCTYPE = '<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "https://{}/DTDs/PropertyList-1.0.dtd">'
HEAD = '<?xml version="1.0" encoding="UTF-8"?>' + DOCTYPE.format("www.apple.com") + '<plist version="1.0">'
ENTITLED = (
    "Executable=/opt/podman/bin/vfkit\n" + HEAD + "<dict><key>com.apple.security.network.client</key><true/>"
    "<key>com.apple.security.virtualization</key><true/></dict></plist>"
)
WITHOUT = "Executable=/usr/local/bin/vfkit\n"
OTHERS = ENTITLED.replace("security.virtualization", "security.hypervisor")
DENIED = ENTITLED.replace("<true/></dict>", "<false/></dict>")
UNSIGNED = "/usr/local/bin/vfkit: code object is not signed at all\n"

FREE = "xattr: /opt/podman/bin/vfkit: No such xattr: com.apple.quarantine\n"
DOWNLOADED = "0081;65f1b2c3;Safari;F643CD5F-6071-46AB-83AB-390BA944DEC5\n"
APPROVED = "00C1;607842eb;Brave;F643CD5F-6071-46AB-83AB-390BA944DEC5\n"


class Mac:
    """The tools and the programs of a Mac; whatever the tools are asked, they write down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.vfkit = directory / "vfkit"
        self.gvproxy = directory / "gvproxy"
        self.kernel = directory / "kernel"
        for program in (self.vfkit, self.gvproxy):
            program.write_bytes(b"\xcf\xfa\xed\xfe" + bytes(100))
        self.kernel.write_bytes(bzimage("6.1.0-13-amd64"))
        self.codesign = self.tool("codesign", ENTITLED)
        self.xattr = self.tool("xattr", FREE, status=1)

    def tool(self, name: str, says: str, *, status: int = 0) -> Path:
        (self.directory / f"{name}.says").write_text(says)
        path = self.directory / name
        path.write_text(
            f"#!/bin/sh\necho {name} \"$@\" >>'{self.directory}/asked'\ncat '{path}.says' >&2\nexit {status}\n"
        )
        path.chmod(0o755)
        return path

    @property
    def asked(self) -> list[str]:
        """The tools' command lines, without this directory."""
        found = self.directory / "asked"
        return found.read_text().replace(f"{self.directory}/", "").splitlines() if found.exists() else []

    async def check(self, program: Path | None = None, *, entitled: bool = True) -> None:
        await macos.check_program(program or self.vfkit, entitled=entitled, codesign=self.codesign, xattr=self.xattr)

    async def preflight(self, host: MacHost | None, *, rosetta: bool = False, cmdline: str = "") -> None:
        await macos.preflight(
            self.vfkit,
            self.gvproxy,
            self.kernel,
            rosetta=rosetta,
            cmdline=cmdline,
            host=host,
            codesign=self.codesign,
            xattr=self.xattr,
        )


@pytest.fixture
def mac(tmp_path: Path) -> Mac:
    return Mac(tmp_path)


def bzimage(version: str, *, pointer: int = 0x3000) -> bytes:
    image = bytearray(0x20000)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = pointer.to_bytes(2, "little")
    at = 0x200 + pointer
    text = f"{version} (builder@host) #1 SMP\0".encode()
    image[at : at + len(text)] = text
    return bytes(image)


# --- programs


async def test_an_entitled_program_out_of_quarantine_passes(mac):
    await mac.check()
    assert mac.asked == ["xattr -p com.apple.quarantine vfkit", "codesign -d --entitlements - --xml vfkit"]


@pytest.mark.parametrize(
    ("says", "status"), [(WITHOUT, 0), (OTHERS, 0), (DENIED, 0), (UNSIGNED, 1), (ENTITLED[:-20], 0), ("", 1)]
)
async def test_a_program_that_may_not_virtualize_is_refused(mac, says, status):
    """Whatever codesign said is the evidence."""
    mac.tool("codesign", says, status=status)
    with pytest.raises(HelperError, match=r"vfkit is not signed for virtualization") as refused:
        await mac.check()
    assert refused.value.hint
    assert list(refused.value.log_tail) == says.splitlines()[:5]


@pytest.mark.parametrize(
    "xml",
    [
        "<plist><dict><key>a</key></plist>",
        "<plist></plist>",
        '<plist version="1.0"><array/></plist>',
        '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><plist><string>&b;</string></plist>',
        "<plist><integer>x</integer></plist>",
    ],
)
def test_no_signature_can_raise(xml):
    """What stands in a file's signature is up to the file."""
    assert not macos.is_entitled(f"Executable=/x\n{xml}\n")


async def test_a_program_from_the_network_is_left_to_its_user(mac):
    """Refused with the command that lifts the mark, which is not lifted here, and the signature is not asked."""
    mac.tool("xattr", DOWNLOADED)
    with pytest.raises(HelperError, match=r"vfkit was downloaded") as refused:
        await mac.check()
    assert refused.value.hint == f"run this if you trust it: xattr -d com.apple.quarantine {mac.vfkit}"
    assert refused.value.log_tail == (DOWNLOADED.strip(),)
    assert mac.asked == ["xattr -p com.apple.quarantine vfkit"]


async def test_what_its_user_has_approved_passes(mac):
    """The mark stays on a file after that, with another flag."""
    mac.tool("xattr", APPROVED)
    await mac.check()


async def test_gvproxy_needs_no_entitlement(mac):
    mac.tool("codesign", UNSIGNED, status=1)
    await mac.check(mac.gvproxy, entitled=False)
    assert mac.asked == ["xattr -p com.apple.quarantine gvproxy"]


async def test_a_scripts_signature_is_not_asked(mac):
    """What a wrapper starts may be entitled all the same."""
    mac.vfkit.write_text('#!/bin/sh\nexec /nix/store/vfkit "$@"\n')
    mac.tool("codesign", UNSIGNED, status=1)
    await mac.check()


async def test_without_the_tools_nothing_is_refused(mac):
    """Neither where they are missing nor where they cannot be run."""
    mac.xattr.unlink()
    mac.codesign.chmod(0o644)
    await mac.check()
    assert mac.asked == []


# --- the Mac


@pytest.mark.parametrize(
    ("told", "version"),
    [
        ("14.7.1", (14, 7, 1)),
        ("13.0", (13, 0)),
        ("26.1", (26, 1)),
        ("16.1", (26, 1)),
        ("10.16", ()),
        ("10.15.7", (10, 15, 7)),
        ("", ()),
        ("beta", ()),
    ],
)
def test_what_macos_tells_old_programs_is_understood(told, version):
    assert macos.macos_version(told) == version


@pytest.mark.parametrize(
    ("machine", "kernel", "translated"),
    [
        ("arm64", "Darwin Kernel Version 24.1.0: root:xnu-11215~1/RELEASE_ARM64_T6000", False),
        ("x86_64", "Darwin Kernel Version 24.1.0: root:xnu-11215~1/RELEASE_ARM64_T6000", True),
        ("x86_64", "Darwin Kernel Version 22.6.0: root:xnu-8796~1/RELEASE_X86_64", False),
    ],
)
def test_this_host_is_what_it_says_it_is(monkeypatch, machine, kernel, translated):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine, version=kernel))
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), machine))
    assert macos.this_host() == MacHost(machine, (15, 1), translated)


@pytest.mark.parametrize(
    ("host", "rosetta", "words"),
    [
        (MacHost("arm64", (12, 7, 6)), False, "this is macOS 12.7.6; vfkit needs 13 or newer"),
        (MacHost("x86_64", (10, 15, 7)), False, "this is macOS 10.15.7"),
        (INTEL, True, "rosetta runs Intel programs on Apple chips, and this Mac is x86_64"),
        (MacHost("x86_64", (15, 1), translated=True), False, "this Python is an Intel program on an Apple chip"),
    ],
)
def test_a_mac_that_cannot_do_it_is_refused(host, rosetta, words):
    with pytest.raises(UnsupportedError, match=words) as refused:
        macos.check_host(host, rosetta=rosetta)
    assert refused.value.hint


@pytest.mark.parametrize("host", [APPLE, MacHost("arm64", ()), MacHost("arm64", (13,)), MacHost("arm64", (26, 0))])
def test_other_macs_pass(host):
    macos.check_host(host, rosetta=True)
    macos.check_host(MacHost("x86_64", host.version), rosetta=False)


# --- kernels


@pytest.mark.parametrize("linux", [(6, 12), (6, 16), (7, 0)])
@pytest.mark.parametrize("version", [(13, 0), (14, 7, 1), (15, 4, 1)])
def test_a_kernel_with_protection_keys_needs_a_newer_macos_on_intel(linux, version):
    with pytest.raises(
        UnsupportedError, match=r"Linux [67]\.\d+ does not boot on an Intel Mac before macOS 15\.5"
    ) as no:
        macos.check_kernel_on_host(MacHost("x86_64", version), linux)
    assert macos.show_version(version) in no.value.message
    assert "nopku" in no.value.hint
    macos.check_kernel_on_host(MacHost("x86_64", version), linux, cmdline="quiet nopku")


@pytest.mark.parametrize(
    ("host", "linux"),
    [
        (INTEL, (6, 11)),
        (INTEL, (5, 15)),
        (INTEL, None),
        (APPLE, (6, 12)),
        (MacHost("x86_64", (15, 5)), (6, 12)),
        (MacHost("x86_64", (26, 0)), (6, 16)),
        (MacHost("x86_64", ()), (6, 12)),
    ],
)
def test_others_pass(host, linux):
    macos.check_kernel_on_host(host, linux)


@pytest.mark.parametrize(
    ("content", "version"),
    [
        (bzimage("6.12.43+deb13-amd64"), (6, 12)),
        (bzimage("5.4.0", pointer=0xFFFF - 0x200), (5, 4)),
        (bzimage("6.12.1", pointer=0), None),
        (bzimage("none"), None),
        (bzimage("6.12.1")[:0x3200], None),
        (b"MZ" + bytes(54) + b"ARM\x64" + bytes(4096) + b"Linux version 6.12.1", None),
        (b"", None),
    ],
)
def test_a_kernels_version_is_in_its_header(tmp_path, content, version):
    (tmp_path / "kernel").write_bytes(content)
    assert macos.linux_version(tmp_path / "kernel") == version


def test_a_kernel_that_is_not_there_has_no_version(tmp_path):
    assert macos.linux_version(tmp_path / "none") is None


# --- all together


async def test_preflight_asks_both_programs(mac):
    await mac.preflight(APPLE, rosetta=True)
    assert mac.asked == [
        "xattr -p com.apple.quarantine vfkit",
        "codesign -d --entitlements - --xml vfkit",
        "xattr -p com.apple.quarantine gvproxy",
    ]


async def test_preflight_knows_the_kernel(mac):
    mac.kernel.write_bytes(bzimage("6.12.43"))
    with pytest.raises(UnsupportedError, match=r"Linux 6\.12 does not boot"):
        await mac.preflight(INTEL)
    await mac.preflight(INTEL, cmdline="nopku")
    await mac.preflight(APPLE)


async def test_preflight_refuses_each_for_its_own_reason(mac):
    with pytest.raises(UnsupportedError, match="rosetta"):
        await mac.preflight(INTEL, rosetta=True)
    mac.tool("codesign", WITHOUT)
    with pytest.raises(HelperError, match="vfkit is not signed"):
        await mac.preflight(APPLE)
    mac.tool("codesign", ENTITLED)
    mac.xattr.write_text(f"#!/bin/sh\ncase $3 in */gvproxy) echo '{DOWNLOADED}' ;; esac\n")
    with pytest.raises(HelperError, match="gvproxy was downloaded"):
        await mac.preflight(APPLE)


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac asks itself")
async def test_elsewhere_there_is_nothing_to_ask(mac):
    """A double of vfkit runs on any system."""
    mac.tool("codesign", UNSIGNED)
    await mac.preflight(None, rosetta=True)
    assert mac.asked == []
