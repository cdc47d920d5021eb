"""Which end-to-end tests there are on a Mac."""

from __future__ import annotations

import pytest

import under


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what has nothing to test on a Mac."""
    if under.MAC and (reason := under.LINUX_ALONE.get(item.path.name)):
        pytest.skip(reason)
