"""Each pure parser of what a guest, a file or a server wrote is fed what nobody would write on purpose."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz
from ovm import health, settings
from ovm.errors import OVMError
from ovm.guest import ports, ready
from ovm.image import images, index

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
        told = ready.ReadyChannel(on_reset=lambda: None, on_warning=lambda _: None)
        for line in _text(content).split("\n"):
            told.hear(line)

    asyncio.run(hear())


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
        lambda content: ports.parse("/services/forwarder/expose", content),
        (b'{"local": ":8080", "protocol": "tcp"}', b'{"local": "[::1]:53", "protocol": "udp"}'),
    ),
    "ready": (_ready, (b"stage boot 1.5\nready 2.0\n", b"warn something\nfatal data-disk words\n")),
    "health": (health.parse, (b"1000 500 rw 0\n",)),
    "index": (index.read_index, (b'{"format": 1, "images": {}}',)),
    "image": (lambda content: images.read_description(content, "it"), (b'{"format": 1, "guest": "ovm", "files": {}}',)),
}
"""With texts that each understands, or nearly."""
REFUSALS = (OVMError, ports.Refused)


def try_out(name: str, content: bytes) -> None:
    """Raises if the parser fails otherwise than by refusing."""
    parse, _ = PARSERS[name]
    with contextlib.suppress(*REFUSALS):
        parse(content)


@pytest.mark.parametrize("name", PARSERS)
@fuzz.examples(2000)
@given(data=st.data())
def test_a_parser_refuses_or_understands(name, data):
    """B14: it raises nothing but an error of ours, whatever it is given."""
    start = data.draw(st.sampled_from(PARSERS[name][1]) | fuzz.documents())
    try_out(name, start)
    try_out(name, fuzz.mutated(data.draw, start))
