"""Options of a machine: typed, frozen, checked before anything is changed.

Each can also be given as a mapping with the seed's camelCase keys.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ovm.errors import OptionError
from ovm.model import defaults
from ovm.model.validation import CHECKS, Accelerator, GuestProfile, NetworkLoss, check_kind
from ovm.paths import expanded

PODMAN_PORT_FIRST = 58125
SSH_PORT_FIRST = 2223
MIB = 1024 * 1024

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class OriginPath:
    """The origin files of a machine. They are copied to ``target_dir`` and never changed."""

    gvproxy: Path | None = None
    """Default: the installed one."""
    kernel: Path
    """A bzImage on x86_64; an Image on arm64, unpacked if it is compressed with gzip or zstd."""
    initrd: Path
    rootfs: Path
    """``rootfs.btrfs``, or ``rootfs.btrfs.zip``, which is unpacked."""
    vfkit: Path | None = None
    """Only for ``create_darwin_ovm``. Default: the installed one."""

    def named(self) -> dict[str, Path]:
        """Return the given files by their names in ``versions``."""
        return {f.name: p for f in dataclasses.fields(self) if (p := getattr(self, f.name)) is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Versions:
    """A version string for each file. A file is copied again when its string differs from the recorded one."""

    gvproxy: str | None = None
    kernel: str
    initrd: str
    rootfs: str
    vfkit: str | None = None

    def named(self) -> dict[str, str]:
        """Return the given versions by name."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}


@dataclass(frozen=True, slots=True)
class Mount:
    """A host folder shared with the guest (virtiofs)."""

    host_path: Path
    guest_path: str = ""
    """Absolute path; if empty, the host's path, so that ``-v`` works with host paths."""
    read_only: bool = False

    def __post_init__(self) -> None:
        try:
            host = expanded(self.host_path)
        except TypeError as error:
            raise OptionError(f"mounts: host_path={self.host_path!r} is not a path") from error
        if not host.is_absolute():
            raise OptionError(f"mounts: the host path {host} is not absolute", hint="give an absolute path")
        given = str(self.guest_path or host)
        if "\0" in given or "\0" in os.fspath(host):
            raise OptionError("mounts: a path cannot contain a NUL")
        parts = [part for part in given.split("/") if part not in {"", "."}]
        guest = "/" + "/".join(parts)  # canonical, to detect reserved and duplicate mount points
        if not given.startswith("/") or ".." in parts or guest in _RESERVED_MOUNTS:
            raise OptionError(
                f"mounts: {given!r} cannot be a mount point in the guest",
                hint="give an absolute path without '..' that is not one of the guest's own directories",
            )
        if not isinstance(self.read_only, bool):
            raise OptionError(f"mounts: read_only={self.read_only!r} is neither True nor False")
        object.__setattr__(self, "host_path", host)
        object.__setattr__(self, "guest_path", guest)


_RESERVED_MOUNTS = frozenset(
    {"/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr", "/var", "/root"}
    | {"/var/lib", "/var/lib/containers", "/usr/lib", "/usr/bin"}
)


DARWIN_SHARED = ("/Users", "/var/folders", "/private")
"""Folders that the seed shares on macOS: user files and temporary files."""


def _system_mounts() -> tuple[Mount, ...]:
    return tuple(Mount(Path(path)) for path in DARWIN_SHARED) if sys.platform == "darwin" else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """All options of a machine. Only the first six have no default."""

    origin_path: OriginPath
    target_dir: Path
    socket_dir: Path
    log_dir: Path
    ssh_key_dir: Path
    versions: Versions
    cpus: int = field(default_factory=lambda: max(1, (os.cpu_count() or 2) // 2))
    """Virtual CPUs. Default: half the host's."""
    memory_mib: int = defaults.MEMORY_MIB
    data_disk_mib: int = defaults.DATA_DISK_MIB
    """Size of the sparse data disk; it can only grow."""
    mounts: tuple[Mount, ...] = field(default_factory=_system_mounts)
    """Host folders shared with the guest. Default: /Users, /var/folders and /private on macOS, none on Linux."""
    podman_tcp: bool = True
    """Whether podman's API is also on a loopback TCP port of the host, open to any local program."""
    publish_address: str = "127.0.0.1"
    """Host address for a container's published port when ``-p`` names none."""
    hostname: str = "ovm"
    timezone: str | None = None
    """An IANA zone. Default: the host's."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables for the engine and for logins in the guest, such as proxies."""
    ca_certificates: tuple[Path, ...] = ()
    """PEM files of CA certificates that the guest trusts in addition to its own."""
    dns: tuple[str, ...] = ()
    """IPv4 addresses of name servers for the guest and its containers. Default: the host's, through gvproxy."""
    accelerator: Accelerator = "auto"
    """``auto`` probes the host and caches the result until the host reboots."""
    qemu: Path | None = None
    """The ``qemu-system-…`` to use instead of the one on ``PATH``."""
    virtiofsd: Path | None = None
    """The ``virtiofsd`` to use instead of the installed one."""
    kernel_cmdline: str = ""
    """Appended to ovm's kernel command line."""
    ssh_agent: bool = False
    """Whether root in the guest can use the user's ssh agent (``SSH_AUTH_SOCK``), at ``/run/ovm/ssh-agent.sock``."""
    foreign_arch: bool = False
    """Whether containers of the other architecture (arm64 on x86_64, x86_64 on arm64) run, emulated by QEMU."""
    rosetta: bool = False
    """Whether x86_64 programs run under Apple's Rosetta; only on Macs with Apple silicon."""
    pause_on_sleep: bool = True
    """Whether the machine is paused before the host sleeps, and resumed with its clock set after the host wakes."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Known SHA-256 digests of origin files, in hexadecimal, by their names in ``versions``. For a plain copy of such a
    file, this digest is recorded and later verified, and none is computed."""
    network_loss: NetworkLoss = "restart"
    """What to do when gvproxy has died and cannot be replaced, as under vfkit: ``restart`` or ``stop`` the machine."""
    guest: GuestProfile = "ovm"
    """``ovm``: ovm's image. ``ovm-core``: the seed's image, macOS only. ``bare``: a guest that only reports ready."""

    def __post_init__(self) -> None:
        check_kind("origin_path", self.origin_path, OriginPath, "an OriginPath")
        check_kind("versions", self.versions, Versions, "a Versions")
        for name, check in CHECKS.items():
            check(name, getattr(self, name))
        given, wanted = set(self.versions.named()), set(self.origin_path.named())
        if missing := wanted - given:
            raise OptionError(
                f"versions lacks {', '.join(sorted(missing))}",
                hint="give each file of origin_path a version string",
            )

    @classmethod
    def of(cls, given: Options | Mapping[str, Any] | None = None, /, **options: Any) -> Options:
        """Create options from an object, a mapping (snake_case or the seed's camelCase), keywords, or a mix of them.

        Raises:
            OptionError: a key is unknown or missing, or a value is invalid.
        """
        if isinstance(given, Options):
            known = _known(cls, options)
            return dataclasses.replace(given, **{name: _converted(cls, name, value) for name, value in known.items()})
        return _build(cls, {**_known(cls, given or {}), **_known(cls, options)})


def _snake(key: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", lambda m: "_" + m[1].lower(), key)


def _known(cls: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` with snake_case keys, all of them fields of ``cls``."""
    if not isinstance(given, Mapping):
        raise OptionError(f"{cls.__name__} cannot be made from {type(given).__name__}")
    names = [f.name for f in dataclasses.fields(cls)]
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = _snake(key)
        if name not in names:
            import difflib

            close = difflib.get_close_matches(name, names, 1)
            raise OptionError(
                f"there is no option {key!r}", hint=f"did you mean {close[0]}?" if close else f"use one of {names}"
            )
        found[name] = value
    return found


def _build(cls: type[_T], given: Mapping[str, Any]) -> _T:
    required = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if given.get(name) is None]:
        raise OptionError(f"{cls.__name__}: {', '.join(missing)} must be given")
    return cls(**{name: _converted(cls, name, value) for name, value in given.items()})


_PATHS = frozenset(
    {"gvproxy", "kernel", "initrd", "rootfs", "vfkit", "target_dir", "socket_dir", "log_dir", "ssh_key_dir"}
    | {"qemu", "virtiofsd", "host_path"}
)


def _converted(cls: type[Any], name: str, value: Any) -> Any:
    """Convert mappings to their dataclass, and strings to paths where the field is a path."""
    match name, value:
        case "origin_path", Mapping():
            return _build(OriginPath, _known(OriginPath, value))
        case "versions", Mapping():
            versions = _known(Versions, value)
            if wrong := [key for key, v in versions.items() if not isinstance(v, str) and v is not None]:
                raise OptionError(f"versions: {wrong[0]} is not a string")
            return _build(Versions, versions)
        case "mounts", Sequence() if not isinstance(value, str):
            return tuple(m if isinstance(m, Mount) else _build(Mount, _known(Mount, m)) for m in value)
        case "ca_certificates", Sequence() if not isinstance(value, str):
            return tuple(_path(name, v) for v in value)
        case "dns", Sequence() if not isinstance(value, str):
            return tuple(value)
        case _ if name in _PATHS and cls is not Versions and value is not None:
            return _path(name, value)
        case _:
            return value


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise OptionError(f"{name}={value!r} is not a path")
    return expanded(value).absolute()
