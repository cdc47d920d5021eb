"""docker compose v2 against a machine; see test_clients.py, and for when it is built conftest.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import clients
import composing
import under

pytestmark = [pytest.mark.full, under.QEMU_ALONE]


async def test_compose_does_what_it_does_with_any_engine(surroundings: str, tmp_path: Path) -> None:
    """All of it by files of its own."""
    program = await asyncio.to_thread(composing.compose)
    with clients.opened("Compose", surroundings, tmp_path, program) as client:
        await asyncio.to_thread(clients.check, client, tmp_path)
