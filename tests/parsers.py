"""Every pure parser of what a guest, a file or a server wrote, for tests that feed them what nobody would write."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ovm import paths
from ovm.cli import timeline
from ovm.errors import OVMError
from ovm.guest import boot_channel, port_publisher
from ovm.image import images, index
from ovm.machine import health
from ovm.model.info import Stage
from ovm.process import lock
from ovm.registry import records, settings

Parse = Callable[[bytes], object]


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


def _settings(content: bytes) -> None:
    settings.parse(_text(content), Path("machine.toml"))


def _changed(content: bytes) -> None:
    key, _, rest = _text(content).partition("\n")
    value, _, text = rest.partition("\n")
    after = settings.changed(text, key, value)
    assert settings.parse(after, Path("machine.toml")) is not None


def _ready(content: bytes) -> None:
    async def hear() -> None:
        told = boot_channel.ReadyChannel(on_reset=lambda: None, on_warning=lambda _: None)
        for line in _text(content).split("\n"):
            told.hear(line)

    asyncio.run(hear())


def _record(kind: type[records.ServiceRecord | records.Ended]) -> Parse:
    def parse(content: bytes) -> None:
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(content)
            records.read(Path(file.name), kind)

    return parse


def _lock_note(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / paths.LOCK).write_bytes(content)
        lock.owner(Path(directory))


def _units(content: bytes) -> None:
    timeline.units(_text(content), [Stage("guest: initrd", 2800.0, 2450.0), Stage("ready", 9000.0)])


PARSERS: Mapping[str, tuple[Parse, tuple[bytes, ...]]] = {
    "settings": (
        _settings,
        (
            b'cpus = 2\nmemory = "2G"\nmounts = ["~/src", "/a:/b:ro"]\nports = ["8080:80"]\n',
            b'[environment]\nA = "1"\n',
        ),
    ),
    "changed": (_changed, (b"cpus\n2\nmemory = 512\n", b'environment.A\nb\n[environment]\nA = "1"\nB = "2"\n')),
    "ports": (
        lambda content: port_publisher.parse("/services/forwarder/expose", content),
        (b'{"local": ":8080", "protocol": "tcp"}', b'{"local": "[::1]:53", "protocol": "udp"}'),
    ),
    "ready": (_ready, (b"stage boot 1.5\nready 2.0\n", b"warn something\nfatal data-disk words\n")),
    "health": (health.parse, (b"1000 500 rw 0\n",)),
    "service record": (
        _record(records.ServiceRecord),
        (b'{"pid": 1, "started": 2, "program": "/p", "version": "1", "started_at": 1.5, "socket_dir": "/"}',),
    ),
    "ended record": (_record(records.Ended), (b'{"at": 1.5, "reason": "failed", "code": "ovm", "message": "why"}',)),
    "lock note": (
        _lock_note,
        (b'{"boot_id": "b", "manager": {"pid": 1, "started": 2, "program": "/p"}, "command": "c", "since": 1}',),
    ),
    "units": (
        _units,
        (
            b"Id=a.service\nInactiveExitTimestampMonotonic=1000000\nActiveEnterTimestampMonotonic=2000000\n\nId=b.service\n",
        ),
    ),
    "index": (index.read_index, (b'{"format": 1, "images": {}}',)),
    "image": (lambda content: images.read_description(content, "it"), (b'{"format": 1, "guest": "ovm", "files": {}}',)),
}
"""With texts that each understands, or nearly."""
REFUSALS = (OVMError, port_publisher.Refused)


def try_out(name: str, content: bytes) -> None:
    """Raises if the parser fails otherwise than by refusing."""
    parse, _ = PARSERS[name]
    with contextlib.suppress(*REFUSALS):
        parse(content)
