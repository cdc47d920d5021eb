"""``ovm support-bundle``: what somebody who is to help needs to know, in one file, without secrets."""

from __future__ import annotations

import io
import platform
import re
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ovm.cli import Ui, run
from ovm.cli.names import name_argument

if TYPE_CHECKING:
    from ovm.machines import Machine

LOG_MAX_BYTES = 1 << 20
"""Of each log the end."""
_SECRETS = (
    (
        re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL),
        b"[a private key]",
    ),
    (re.compile(rb"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"), b"[removed]"),
    (
        re.compile(
            rb"(?im)^(\s*\"?[\w.-]*(?:token|secret|passw(?:or)?d|api_?key|credential)[\w.-]*\"?\s*[=:]\s*)\S.*$"
        ),
        rb"\1[removed]",
    ),
)
"""Whatever looks like one: keys, passwords in addresses, and what is called so."""


@click.command("support-bundle")
@name_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file.  [default: ovm-NAME-DATE.tar.gz here]")
@click.pass_obj
def command(ui: Ui, /, name: str, output: Path | None) -> None:
    """Pack what is known of the machine NAME and of this host, its logs above all, into one file to send to somebody.

    Keys, passwords and what is called token or secret is taken out. What containers print is not among it.
    """
    from ovm import machines
    from ovm.cli.progress import steps

    machine = machines.find(name)
    path = output or Path(time.strftime(f"ovm-{name}-%Y%m%d-%H%M%S.tar.gz"))
    with steps(ui.progress).step(f"packing {path}"), tarfile.open(path, "x:gz") as bundle:
        path.chmod(0o600)
        for inside, content in _contents(machine):
            entry = tarfile.TarInfo(f"ovm-{name}/{inside}")
            clean = without_secrets(content)
            entry.size, entry.mtime, entry.mode = len(clean), int(time.time()), 0o600
            bundle.addfile(entry, io.BytesIO(clean))
    click.echo(path)


def without_secrets(content: bytes) -> bytes:
    """``content`` with what looks like a secret taken out."""
    for pattern, instead in _SECRETS:
        content = pattern.sub(instead, content)
    return content


def _contents(machine: Machine) -> Iterator[tuple[str, bytes]]:
    import json

    from ovm import __version__
    from ovm.errors import OVMError
    from ovm.service.client import Service

    about = {
        "ovm": __version__,
        "python": sys.version,
        "system": platform.platform(),
        "machine": platform.machine(),
        "frozen": bool(getattr(sys, "frozen", False)),
    }
    yield "host.json", json.dumps(about, indent=2).encode()
    yield "doctor.json", run(_doctor())
    service = Service(machine.name, machine.service_socket)
    for inside, ask in (("status.json", service.status), ("info.json", service.info), ("ports.json", service.ports)):
        try:
            yield inside, _json(ask())
        except OVMError as error:
            yield inside, _json(error.as_dict())
    for path in (machine.settings_path, machine.directory / "ended.json", machine.target / "versions.json"):
        if path.is_file():
            yield path.name, path.read_bytes()
    for path in sorted(machine.log_dir.glob("*.log")):
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - LOG_MAX_BYTES))
            yield f"log/{path.name}", log.read()


async def _doctor() -> bytes:
    from ovm.cli.doctor import examine

    return _json(await examine())


def _json(told: object) -> bytes:
    import msgspec

    return msgspec.json.format(msgspec.json.encode(told, enc_hook=str))
