"""What it means that a service does not answer: it has ended, it is ending, or it hangs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovm.errors import GuestError, StateError
from ovm.service import client, remote
from ovm.wire import http


@contextlib.contextmanager
def hanging_up(path: Path, *, ends: bool) -> Iterator[None]:
    """A server that hears a question and hangs up; it ``ends`` then, or does so with everybody."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(5)
                    if ends:
                        connection.recv(100_000)
                        server.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


async def ask(path: Path, *, waits: bool) -> object:
    """One of the two clients."""
    if waits:
        return await asyncio.to_thread(client.Service("dev", path).info)
    async with http.connect(path) as api, contextlib.AsyncExitStack() as stack:
        status = client.p.Status(
            name="dev", state="", step="", started_at=0.0, pid=1, version="", api=1, health=None, restart_needed=[]
        )
        return await remote.RemoteOVM("dev", path, api, stack, status).info()


@pytest.mark.parametrize("waits", [True, False])
async def test_one_that_ends_meanwhile_is_not_running(short_path: Path, waits: bool) -> None:
    """And not one that does not answer: who stops a machine asks what became of it."""
    path = short_path / "ovm.sock"
    with hanging_up(path, ends=True):
        with pytest.raises(StateError, match="dev is not running"):
            await ask(path, waits=waits)
    with pytest.raises(StateError, match="dev is not running"):  # the socket is still there
        await ask(path, waits=waits)


@pytest.mark.parametrize("waits", [True, False])
async def test_one_that_goes_on_does_not_answer(short_path: Path, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ENDING_S", 0.1)
    path = short_path / "ovm.sock"
    with hanging_up(path, ends=False), pytest.raises(GuestError, match="does not answer"):
        await ask(path, waits=waits)
