"""What several groups of tests need from the machine they run on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovm import helpers
from ovm.errors import HelperError


@pytest.fixture(scope="session")
async def gvproxy() -> Path:
    """The real gvproxy: $OVM_TEST_GVPROXY, or the one that is installed."""
    if chosen := os.environ.get("OVM_TEST_GVPROXY"):
        return Path(chosen)
    try:
        return (await helpers.find_gvproxy()).path
    except HelperError as error:
        pytest.skip(error.message)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A private directory with a path short enough for sockets, whatever pytest's own is."""
    directory = Path(tempfile.mkdtemp(prefix="ovm-", dir=Path("/tmp").resolve()))  # a link on macOS
    yield directory
    shutil.rmtree(directory)
