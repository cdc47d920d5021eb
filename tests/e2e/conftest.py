"""Which end-to-end tests there are on a Mac, and a home for those of the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import homes
import tiny
import under


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what has nothing to test on a Mac."""
    if under.MAC and (reason := under.LINUX_ALONE.get(item.path.name)):
        pytest.skip(reason)


@pytest.fixture
def home(tiny_guest: tiny.Guest, gvproxy: Path, short_path: Path) -> Iterator[homes.Home]:
    """An ``OVM_HOME`` of its own for the command; nothing runs there afterwards."""
    made = homes.Home(short_path, tiny_guest, gvproxy)
    yield made
    made.end()
