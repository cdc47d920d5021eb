"""Clients nobody here wrote, against one machine: what people type and what their programs call just works.

Under QEMU alone: what they speak with is gvproxy and podman, which are the same under vfkit. Compose is in
test_with_compose.py, the last file of this directory, so that it is built by then."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import clients
import under
from full import BUSYBOX_IMAGE
from ovm.network.host_ports import free_port

pytestmark = [pytest.mark.full, under.QEMU_ALONE]

CLIENTS = ("Docker", "Podman", "DockerPy", "PodmanPy", "Testcontainers")


@pytest.mark.parametrize("kind", CLIENTS)
async def test_it_does_what_it_does_with_any_engine(kind: str, surroundings: str, tmp_path: Path) -> None:
    """Run, logs, exec, build, volumes, networks, events, a published port, and input over attach."""
    with clients.opened(kind, surroundings, tmp_path) as client:
        await asyncio.to_thread(clients.check, client, tmp_path)


# -- what is podman's own, each in docs/clients.md with upstream's word on it


async def test_buildkit_is_not_there(surroundings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So docker has to be told to build without: containers/podman#17836."""
    docker = clients.Docker(surroundings, tmp_path)
    argv = ("build", clients.built_from(tmp_path / "context"))
    with pytest.raises(AssertionError, match="docker build"):
        await asyncio.to_thread(docker, *argv, more={"DOCKER_BUILDKIT": "1"})
    await asyncio.to_thread(docker, *argv)


async def test_docker_is_not_told_why_a_container_does_not_start(surroundings: str, tmp_path: Path) -> None:
    """podman is: containers/podman#22285."""
    missing = ("run", "--rm", BUSYBOX_IMAGE, "/no/such/program")
    with pytest.raises(AssertionError, match="unable to upgrade to tcp, received 500"):
        await asyncio.to_thread(clients.Docker(surroundings, tmp_path), *missing)
    with pytest.raises(AssertionError, match="/no/such/program"):
        await asyncio.to_thread(clients.Podman(surroundings, tmp_path), *missing)


async def test_podman_4_cannot_tell_what_happens(surroundings: str, tmp_path: Path) -> None:
    """It shows null for what has no exit code: containers/podman#28325."""
    podman = clients.Podman(surroundings, tmp_path)
    if not clients.prints_null(podman):
        pytest.skip("this podman is newer")
    told = await asyncio.to_thread(events_of_a_server, podman)
    assert "null" in told
    assert not told & {"create", "init", "start"}


def events_of_a_server(client: clients.Client) -> set[str]:
    port = free_port("tcp", "127.0.0.1", 0)
    assert port is not None
    with client.serve(port) as container:
        return client.events(container)


async def test_podman_py_has_no_attach(surroundings: str, tmp_path: Path) -> None:
    """Nor an issue for it; its sources raise that."""
    with clients.opened("PodmanPy", surroundings, tmp_path) as client, pytest.raises(NotImplementedError):
        await asyncio.to_thread(client.attach, b"")
