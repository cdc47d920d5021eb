"""Validation of options and settings, before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from ovm.errors import OptionError

Accelerator = Literal["auto", "kvm", "hvf", "tcg"]
GuestProfile = Literal["ovm", "ovm-core", "bare"]
NetworkLoss = Literal["restart", "stop"]
Check = Callable[[str, Any], object]
"""Called with an option's name and value; raises OptionError if the value is invalid."""

MEMORY_MIN_MIB = 256
DATA_DISK_MIN_MIB = 256
PORT_MAX = 65535
SECONDS_MAX = 366 * 24 * 60 * 60
"""A year: a longer time is a mistake, and overflows clocks elsewhere."""
DNS_MOST = 3
"""Number of name servers in resolv.conf that a C library uses."""

ORIGINS = ("gvproxy", "kernel", "initrd", "rootfs", "vfkit")
"""Names of the origin files in ``versions``."""

_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_ZONE = re.compile(r"[A-Za-z0-9_+/-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_kind(name: str, value: Any, kind: type[Any], words: str) -> None:
    """Refuse a value that is not a ``kind``; ``words`` names the expected type in the message.

    Raises:
        OptionError: the value is not a ``kind``.
    """
    if not isinstance(value, kind):
        raise OptionError(f"{name}={value!r} is not {words}")


def check_address(name: str, address: str) -> str:
    """Return an IP address in its canonical form.

    An IPv4-mapped IPv6 address becomes the IPv4 address.

    Raises:
        OptionError: ``address`` is not an IP address.
    """
    import ipaddress

    try:
        found = ipaddress.ip_address(str(address))  # str: ip_address also accepts numbers
    except ValueError as error:
        raise OptionError(f"{name}={address!r} is not an IP address", hint="use 127.0.0.1 for this host") from error
    return str(getattr(found, "ipv4_mapped", None) or found)


def check_port(name: str, port: int, *, lowest: int = 1) -> int:
    """Return ``port`` if it is valid.

    Raises:
        OptionError: ``port`` is not a whole number from ``lowest`` to 65535.
    """
    _whole(lowest, PORT_MAX)(name, port)
    return port


def check_seconds(name: str, seconds: float) -> float:
    """Return ``seconds`` if it is a valid time to wait.

    Raises:
        OptionError: ``seconds`` is not a number from 0 to ``SECONDS_MAX``.
    """
    if type(seconds) not in {int, float} or not 0 <= seconds <= SECONDS_MAX:  # refuses NaN too
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
            raise OptionError(f"{name}={value!r} is unknown", hint=f"use one of {', '.join(allowed)}")

    return check


def _yes_or_no(name: str, value: Any) -> None:
    check_kind(name, value, bool, "True or False")


def _list(name: str, value: Any) -> None:
    check_kind(name, value, tuple, "a list")


def _hostname(name: str, value: Any) -> None:
    check_kind(name, value, str, "text")
    if not _HOSTNAME.fullmatch(value):
        raise OptionError(f"{name}={value!r} is not a host name", hint="use letters, digits and '-', at most 63")


def _timezone(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and _ZONE.fullmatch(value)):
        raise OptionError(f"{name}={value!r} is not the name of a time zone", hint="use a name such as Europe/Berlin")


def _kernel_cmdline(name: str, value: Any) -> None:
    check_kind(name, value, str, "text")
    if any(ord(c) < 32 for c in value):
        raise OptionError(f"{name} must be one line of text")


def _environment(name: str, value: Any) -> None:
    check_kind(name, value, Mapping, "a mapping")
    for key, text in value.items():
        if not _VARIABLE.fullmatch(str(key)) or {"\n", "\0"} & set(str(text)):
            raise OptionError(f"{name}: {key!r} is not a variable name with a one-line value")


def _mounts(name: str, value: Any) -> None:
    _list(name, value)
    from collections import Counter

    counts = Counter(mount.guest_path for mount in value)
    if twice := {point for point, count in counts.items() if count > 1}:
        raise OptionError(f"{name}: {min(twice)} is mounted twice", hint="use each guest path once")


def _dns(name: str, value: Any) -> None:
    """Refuse name servers that the guest cannot query."""
    import ipaddress

    _list(name, value)
    if len(value) > DNS_MOST:
        raise OptionError(f"{name}: {len(value)} name servers are more than the {DNS_MOST} that programs use")
    for server in value:
        try:
            address = ipaddress.IPv4Address(str(server))
        except ValueError as error:
            raise OptionError(
                f"{name}: {server!r} is not an IPv4 address", hint="use IPv4: the guest has no IPv6"
            ) from error
        if address.is_loopback or address.is_unspecified:
            raise OptionError(f"{name}: {server} is the guest itself", hint="use 192.168.127.254 for the host")


def _digests(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name}={value!r} is not a mapping")
    for origin, digest in value.items():
        if origin not in ORIGINS:
            raise OptionError(f"{name}: there is no origin {origin!r}", hint=f"use one of {', '.join(ORIGINS)}")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise OptionError(f"{name}: {digest!r} is not a SHA-256", hint="use 64 hexadecimal digits, in lower case")


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
"""The check of each option, by its name."""
