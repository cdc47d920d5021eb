"""The guest's boot configuration: files in a cpio archive after the initrd.

The kernel unpacks concatenated archives in order (initramfs buffer format, kernel documentation), so this needs no
network, no extra disk and no hypervisor feature. The guest's initrd reads the files from ``/ovm``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_ALIGN = 4
_TRAILER = "TRAILER!!!"
_DIRECTORY = 0o040700
_FILE = 0o100600


def share_tag(number: int) -> str:
    """Return the tag under which the guest mounts the shared folder ``number``."""
    return f"share{number}"


@dataclass(frozen=True, kw_only=True)
class BootConfig:
    """The configuration a guest gets at boot; an empty field omits its file."""

    authorized_key: str
    """Public key that can log in as root."""
    host_key: str
    """Private ssh host key in OpenSSH format; the manager pins it."""
    host_key_public: str
    hostname: str
    machine_id: str
    """32 hexadecimal digits, constant for a machine."""
    timezone: str = ""
    name_servers: tuple[str, ...] = ()
    """DNS servers that replace those of the network."""
    search_domains: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    ca_certificates: Mapping[str, bytes] = field(default_factory=dict)
    """PEM by file name."""
    mounts: tuple[tuple[str, str, bool], ...] = ()
    """Tag, path in the guest, and whether it is read-only."""
    blocked_host_ports: tuple[int, ...] = ()
    """TCP ports of the host's loopback that the guest blocks."""
    foreign_arch: bool = False
    """Whether the guest runs programs of the other architecture by emulation."""
    rosetta: str = ""
    """Tag under which the guest mounts Rosetta, Apple's translator of x86_64 programs."""
    channel_key: str = ""
    """Key that each connection to the boot channel must send, if every process in the guest can connect."""
    format_data: bool = False
    """Whether the guest may format the data disk, if that also has no signature."""

    def files(self) -> dict[str, bytes]:
        """Return the content by path below ``/ovm``."""
        text = {
            "authorized_keys": self.authorized_key,
            "ssh_host_ed25519_key": self.host_key,
            "ssh_host_ed25519_key.pub": self.host_key_public,
            "hostname": self.hostname,
            "machine-id": self.machine_id,
            "timezone": self.timezone,
            "dns": "\n".join(self.name_servers),
            "search": " ".join(self.search_domains),
            "environment": "\n".join(f"{key}={value}" for key, value in self.environment.items()),
            "mounts": "\n".join(
                f"{tag}\t{fstab_escape(path)}\t{'ro' if read_only else 'rw'}" for tag, path, read_only in self.mounts
            ),
            "blocked-host-ports": "\n".join(map(str, self.blocked_host_ports)),
            "format-data": "yes" if self.format_data else "",
            "foreign-arch": "yes" if self.foreign_arch else "",
            "rosetta": self.rosetta,
            "channel-key": self.channel_key,
        }
        files = {name: content.rstrip("\n").encode() + b"\n" for name, content in text.items() if content}
        return files | {f"ca/{name}": pem for name, pem in self.ca_certificates.items()}


def fstab_escape(path: str) -> str:
    """Escape ``path`` for fstab(5): white space and backslashes in octal."""
    return "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in path)


def cpio(files: Mapping[str, bytes]) -> bytes:
    """Pack ``files`` into a newc archive below ``/ovm``, directories first; only root can read them."""
    directories = {"ovm"} | {f"ovm/{parent}" for name in files for parent in _parents(name)}
    entries: list[tuple[str, int, bytes]] = [(name, _DIRECTORY, b"") for name in sorted(directories)]
    entries += [(f"ovm/{name}", _FILE, content) for name, content in sorted(files.items())]
    archive = b"".join(_entry(inode, *entry) for inode, entry in enumerate(entries, start=1))
    return archive + _entry(0, _TRAILER, 0, b"")


def _parents(name: str) -> Iterable[str]:
    return (os.fspath(p) for p in Path(name).parents if os.fspath(p) != ".")


def _entry(inode: int, name: str, mode: int, content: bytes) -> bytes:
    raw = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields)
    return _padded(header + raw) + _padded(content)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % _ALIGN)


def write_initrd(initrd: Path, config: BootConfig, destination: Path) -> None:
    """Write ``initrd`` and ``config`` to ``destination``, readable only by the owner: it holds a private key."""
    content = _padded(initrd.read_bytes()) + cpio(config.files())
    destination.unlink(missing_ok=True)
    fd = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
