"""Who attacks: another user of this host."""

from __future__ import annotations

import pytest

import strangers


@pytest.fixture
def stranger() -> strangers.Stranger:
    """Another user of this host, without an account."""
    return strangers.stranger()
