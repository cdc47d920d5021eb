"""A release, a server that has it, and a place for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ovm.image import download as downloading
from ovm.image import pack_image, pull
from ovm.image.release import Packed
from releases import make_image
from webserver import Web, serving


@pytest.fixture(scope="module")
async def packed(tmp_path_factory) -> Packed:
    """A release; the image it was made of lies beside it."""
    directory = tmp_path_factory.mktemp("made")
    return await pack_image(make_image(directory / "image"), directory)


@pytest.fixture
def web(packed) -> Iterator[Web]:
    """A server that has the release."""
    with serving(Web(packed.path.read_bytes())) as running:
        yield running


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No proxies but the tests' own, and no time for patience."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(downloading, "BACKOFF_S", 0.001)


@pytest.fixture
def target(tmp_path) -> Path:
    """Where the image is to be; another one is there already."""
    return make_image(tmp_path / "images" / "a", rootfs=b"old", versions={"podman": "old"})


@pytest.fixture
def released(monkeypatch):
    """Makes a release the package's own."""
    return lambda made: monkeypatch.setattr(pull, "released_image", lambda _arch: made)
