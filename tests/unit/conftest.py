"""What the unit tests of several rooms need."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest

from ovm.guest.ssh import SSH, make_keys
from ovm.paths import KeyPaths
from ovm.process.child import Group, process_group
from sshd import Sshd, running


@pytest.fixture
async def group(tmp_path) -> AsyncIterator[Group]:
    """A guarded process group of this test's own."""
    async with process_group([], log_path=tmp_path / "guard.log") as guarded:
        yield guarded


@pytest.fixture(scope="session")
def guest_keys(tmp_path_factory) -> KeyPaths:
    """A user key and a guest's host key."""
    keys = KeyPaths(tmp_path_factory.mktemp("keys"))
    make_keys(keys)
    return keys


@pytest.fixture
async def sshd(guest_keys) -> AsyncIterator[Sshd]:
    """A running sshd that takes the user key."""
    async with running(guest_keys) as server:
        yield server


@pytest.fixture
async def ssh(sshd) -> AsyncIterator[SSH]:
    """A client of that sshd."""
    client = sshd.client()
    yield client
    await client.close()


@pytest.fixture
def unused_port() -> int:
    """A TCP port of the loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
