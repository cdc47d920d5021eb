"""What each option may be: checked before anything is touched, alike for a program's options and for settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from ovm.errors import OptionError

Accelerator = Literal["auto", "kvm", "hvf", "tcg"]
GuestProfile = Literal["ovm", "ovm-core", "bare"]
NetworkLoss = Literal["restart", "stop"]
Check = Callable[[str, Any], object]
"""Given the name of an option and its value: raises OptionError if it cannot be that."""

MEMORY_MIN_MIB = 256
DATA_DISK_MIN_MIB = 256
PORT_MAX = 65535
SECONDS_MAX = 366 * 24 * 60 * 60
"""A year: what takes longer is a mistake, and overflows clocks elsewhere."""
DNS_MOST = 3
"""How many name servers of a resolv.conf a C library looks at."""

ORIGINS = ("gvproxy", "kernel", "initrd", "rootfs", "vfkit")
"""The files a machine may be made from, by their names in ``versions``."""

_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_ZONE = re.compile(r"[A-Za-z0-9_+/-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_kind(name: str, value: Any, kind: type[Any], words: str) -> None:
    """Refuse what is no ``kind`` at all; ``words`` say what would be.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(value, kind):
        raise OptionError(f"{name}={value!r} is not {words}")


def check_address(name: str, address: str) -> str:
    """``address`` as everybody writes it, if it is an IP address to bind: one address has one spelling.

    An IPv4 address that is mapped into IPv6 is that IPv4 address.

    Raises:
        OptionError: it is not an address.
    """
    import ipaddress

    try:
        found = ipaddress.ip_address(str(address))  # it would take a number too
    except ValueError as error:
        raise OptionError(f"{name}={address!r} is not an IP address", hint="127.0.0.1 is this host alone") from error
    return str(getattr(found, "ipv4_mapped", None) or found)


def check_port(name: str, port: int, *, lowest: int = 1) -> int:
    """``port`` if it is one.

    Raises:
        OptionError: it is not a whole number from ``lowest`` to 65535.
    """
    _whole(lowest, PORT_MAX)(name, port)
    return port


def check_seconds(name: str, seconds: float) -> float:
    """``seconds`` if it can be waited that long.

    Raises:
        OptionError: it is no number from 0 to ``SECONDS_MAX``.
    """
    if type(seconds) not in {int, float} or not 0 <= seconds <= SECONDS_MAX:  # nor is NaN
        raise OptionError(f"{name}={seconds!r} is not a number of seconds from 0 to {SECONDS_MAX}")
    return seconds


def _whole(lowest: int, highest: int) -> Check:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise OptionError(f"{name}={value!r} is not a whole number from {lowest} to {highest}")

    return check


def _one_of(*allowed: str) -> Check:
    def check(name: str, value: Any) -> None:
        if value not in allowed:
            raise OptionError(f"{name}={value!r} is unknown", hint=f"one of {', '.join(allowed)}")

    return check


def _yes_or_no(name: str, value: Any) -> None:
    check_kind(name, value, bool, "True or False")


def _list(name: str, value: Any) -> None:
    check_kind(name, value, tuple, "a list")


def _hostname(name: str, value: Any) -> None:
    check_kind(name, value, str, "text")
    if not _HOSTNAME.fullmatch(value):
        raise OptionError(f"{name}={value!r} is not a host name", hint="letters, digits and '-', 63 at most")


def _timezone(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and _ZONE.fullmatch(value)):
        raise OptionError(f"{name}={value!r} is not the name of a time zone", hint="Europe/Berlin for one")


def _kernel_cmdline(name: str, value: Any) -> None:
    check_kind(name, value, str, "text")
    if any(ord(c) < 32 for c in value):
        raise OptionError(f"{name} must be one line of text")


def _environment(name: str, value: Any) -> None:
    check_kind(name, value, Mapping, "a mapping")
    for key, text in value.items():
        if not _VARIABLE.fullmatch(str(key)) or {"\n", "\0"} & set(str(text)):
            raise OptionError(f"{name}: {key!r} is not a variable of one line")


def _mounts(name: str, value: Any) -> None:
    _list(name, value)
    from collections import Counter

    counts = Counter(mount.guest_path for mount in value)
    if twice := {point for point, count in counts.items() if count > 1}:
        raise OptionError(f"{name}: {min(twice)} is mounted twice", hint="each guest path can be used once")


def _dns(name: str, value: Any) -> None:
    """Refuse what the guest could not ask."""
    import ipaddress

    _list(name, value)
    if len(value) > DNS_MOST:
        raise OptionError(f"{name}: {len(value)} name servers are more than the {DNS_MOST} that programs look at")
    for server in value:
        try:
            address = ipaddress.IPv4Address(str(server))
        except ValueError as error:
            raise OptionError(f"{name}: {server!r} is not an IPv4 address", hint="the guest has no IPv6") from error
        if address.is_loopback or address.is_unspecified:
            raise OptionError(f"{name}: {server} is the guest itself", hint="there the host is 192.168.127.254")


def _digests(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name}={value!r} is not a mapping")
    for origin, digest in value.items():
        if origin not in ORIGINS:
            raise OptionError(f"{name}: there is no origin {origin!r}", hint=f"one of {', '.join(ORIGINS)}")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise OptionError(f"{name}: {digest!r} is no SHA-256", hint="64 hexadecimal digits, in lower case")


CHECKS: Mapping[str, Check] = {
    "cpus": _whole(1, 255),
    "memory_mib": _whole(MEMORY_MIN_MIB, 1 << 24),
    "data_disk_mib": _whole(DATA_DISK_MIN_MIB, 1 << 24),
    "mounts": _mounts,
    "podman_tcp": _yes_or_no,
    "publish_address": check_address,
    "hostname": _hostname,
    "timezone": _timezone,
    "environment": _environment,
    "ca_certificates": _list,
    "dns": _dns,
    "accelerator": _one_of(*get_args(Accelerator)),
    "kernel_cmdline": _kernel_cmdline,
    "ssh_agent": _yes_or_no,
    "foreign_arch": _yes_or_no,
    "rosetta": _yes_or_no,
    "pause_on_sleep": _yes_or_no,
    "sha256": _digests,
    "network_loss": _one_of(*get_args(NetworkLoss)),
    "guest": _one_of(*get_args(GuestProfile)),
}
"""By the name of the option."""
