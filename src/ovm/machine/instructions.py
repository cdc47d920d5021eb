"""The boot configuration of a guest, independent of how it is delivered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ovm import paths
from ovm.disks import data
from ovm.errors import FileError
from ovm.guest import bootconfig, ssh
from ovm.hypervisors import vfkit
from ovm.model.options import Options
from ovm.paths import KeyPaths, TargetPaths
from ovm.trust.files import advice, read_file

CONTENT_MAX_BYTES = 16 << 20
"""Largest size of a certificate file or a key; a bundle of all public CAs has less than 1 MiB."""


def boot_config(
    options: Options, *, channel_key: str, blocked_host_ports: tuple[int, ...] = ()
) -> bootconfig.BootConfig:
    """Return the configuration for the guest's next boot."""
    keys = KeyPaths(options.ssh_key_dir)
    machine = data.load_machine(TargetPaths(options.target_dir))
    return configure(
        options,
        authorized_key=_key(paths.public(keys.user_key)),
        host_key=_key(keys.host_key),
        host_key_public=_key(paths.public(keys.host_key)),
        machine_id=machine.machine_id,
        channel_key=channel_key,
        blocked_host_ports=blocked_host_ports,
        format_data=not machine.data_ever_ready,
    )


def configure(options: Options, **identity: Any) -> bootconfig.BootConfig:
    """Return the boot configuration of ``options``, with the :class:`BootConfig` fields that have no option."""
    agent = {"SSH_AUTH_SOCK": ssh.AGENT_SOCKET} if options.ssh_agent else {}
    return bootconfig.BootConfig(
        hostname=options.hostname,
        timezone=options.timezone or host_timezone(),
        name_servers=options.dns,
        search_domains=search_domains(),
        environment={**agent, **options.environment},
        ca_certificates={f"{n:02}-{path.stem}.crt": content(path) for n, path in enumerate(options.ca_certificates)},
        mounts=tuple((bootconfig.share_tag(n), m.guest_path, m.read_only) for n, m in enumerate(options.mounts)),
        foreign_arch=options.foreign_arch and not options.rosetta,  # Rosetta does the same, faster
        rosetta=vfkit.ROSETTA_TAG if options.rosetta else "",
        **identity,
    )


def content(path: Path) -> bytes:
    """Read a file whose content goes to the guest.

    Raises:
        FileError: it cannot be read.
    """
    try:
        return read_file(path, CONTENT_MAX_BYTES)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}", hint=advice(error, path)) from error


def _key(path: Path) -> str:
    """Return the text of one of the machine's ssh keys."""
    return content(path).decode(errors="replace")


def host_timezone() -> str:
    """Return the host's IANA zone; empty if it cannot be determined."""
    link = os.path.realpath("/etc/localtime")
    _, found, zone = link.partition("/zoneinfo/")
    if found:
        return zone.removeprefix("posix/")
    try:
        return Path("/etc/timezone").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def search_domains() -> tuple[str, ...]:
    """Return the host's DNS search domains."""
    try:
        lines = Path("/etc/resolv.conf").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    searches = [words[1:] for line in lines if (words := line.split())[:1] == ["search"]]
    return tuple(searches[-1]) if searches else ()
