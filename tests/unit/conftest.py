"""What the unit tests of several rooms need."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from ovm.process.child import Group, process_group
from sshds import guest_keys, ssh, sshd, unused_port

__all__ = ["guest_keys", "ssh", "sshd", "unused_port"]


@pytest.fixture
async def group(tmp_path) -> AsyncIterator[Group]:
    """A guarded process group of this test's own."""
    async with process_group([], log_path=tmp_path / "guard.log") as guarded:
        yield guarded
