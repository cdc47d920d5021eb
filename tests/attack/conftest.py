"""Who attacks: another user of this host; and what is attacked: services that hold no machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import puppets
import strangers
from sshds import guest_keys, ssh, sshd, unused_port

__all__ = ["guest_keys", "ssh", "sshd", "unused_port"]


@pytest.fixture
def stranger() -> strangers.Stranger:
    """Another user of this host, without an account."""
    return strangers.stranger()


@pytest.fixture
def stage(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[puppets.Stage]:
    """Real services that hold puppets; none runs afterwards."""
    made = puppets.Stage(short_path, monkeypatch)
    yield made
    made.end()
