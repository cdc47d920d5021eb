"""What a container engine is for, with clients nobody here wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx2
import pytest

import ovm
from full import BUSYBOX_IMAGE, Podman, eventually, running

pytestmark = pytest.mark.full


async def test_info_tells_where_everything_is(vm: ovm.OVM) -> None:
    """A ready machine has a private podman socket, its TCP twin, an ssh port, and says what accelerates it."""
    info = vm.info
    assert info.podman_socket.is_socket()
    assert info.podman_socket.stat().st_mode & 0o777 == 0o600
    assert info.podman_socket.parent.stat().st_mode & 0o777 == 0o700
    assert info.podman_port is not None
    assert info.podman_port >= 58125
    assert info.ssh_port >= 2223
    assert info.docker_host == f"unix://{info.podman_socket}"
    assert info.accelerator in {"kvm", "tcg", "hvf"}
    assert info.accelerator_reason
    assert [stage.name for stage in info.timings][-1] == "ready"


async def test_podman_answers_over_plain_http(vm: ovm.OVM) -> None:
    """The socket speaks podman's API and Docker's, the loopback port too."""
    transport = httpx2.AsyncHTTPTransport(uds=str(vm.info.podman_socket))
    async with httpx2.AsyncClient(transport=transport, timeout=60) as client:
        told = (await client.get("http://d/v5.0.0/libpod/version")).json()
        assert re.match(r"5\.\d+", told["Components"][0]["Version"])
        assert isinstance((await client.get("http://d/v1.41/containers/json")).json(), list)
        engine = (await client.get("http://d/v5.0.0/libpod/info")).json()
    assert engine["registries"]["search"] == ["docker.io"]
    assert (engine["host"]["cgroupManager"], engine["host"]["logDriver"]) == ("systemd", "json-file")
    async with httpx2.AsyncClient(timeout=60, trust_env=False) as client:
        assert (await client.get(f"http://127.0.0.1:{vm.info.podman_port}/libpod/_ping")).text == "OK"


async def test_run_logs_and_exec(podman: Podman) -> None:
    """A container's output, its logs and a command inside it come back through the remote client."""
    assert (
        await podman("run", "--rm", BUSYBOX_IMAGE, "echo", "hello from a container")
    ).out == "hello from a container"
    async with running(podman, BUSYBOX_IMAGE, "sh", "-c", "echo started; sleep 1000") as container:

        async def logged() -> bool:
            return (await podman("logs", container)).out == "started"

        await eventually(logged)
        assert (await podman("exec", "-i", container, "cat", stdin=b"through stdin")).out == "through stdin"
        assert (await podman("exec", container, "sh", "-c", "exit 7", check=False)).status == 7


async def test_build_from_a_containerfile(podman: Podman, tmp_path: Path) -> None:
    """An image is built from files of the host."""
    (tmp_path / "greeting").write_text("built here\n")
    (tmp_path / "Containerfile").write_text(
        f'FROM {BUSYBOX_IMAGE}\nCOPY greeting /greeting\nRUN cat /greeting > /copied\nCMD ["cat", "/copied"]\n'
    )
    await podman("build", "-t", "localhost/built", tmp_path)
    assert (await podman("run", "--rm", "localhost/built")).out == "built here"


async def test_healthcheck_turns_healthy(podman: Podman) -> None:
    """systemd's timers run health checks."""
    health = ["--health-cmd", "test -e /tmp/ok || touch /tmp/ok", "--health-interval", "2s"]
    async with running(podman, *health, BUSYBOX_IMAGE, "sleep", "1000") as container:

        async def healthy() -> bool:
            found = await podman("inspect", "--format", "{{.State.Health.Status}}", container)
            return found.out == "healthy"

        await eventually(healthy)


async def test_volume_and_network(podman: Podman) -> None:
    """Containers share a volume, and find each other by name on a network of their own."""
    await podman("volume", "create", "kept")
    await podman("network", "create", "inner")
    try:
        await podman("run", "--rm", "-v", "kept:/data", BUSYBOX_IMAGE, "sh", "-c", "echo kept > /data/file")
        arguments = ["--network", "inner", "--name", "server", "-v", "kept:/data", BUSYBOX_IMAGE]
        async with running(podman, *arguments, "httpd", "-f", "-p", "80", "-h", "/data"):
            ask = "printf 'GET /file HTTP/1.0\\r\\n\\r\\n' | nc -w 9 $(getent hosts server | cut -d' ' -f1) 80"
            fetch = f"for i in 1 2 3 4 5 6 7 8 9; do {ask} | grep kept && exit; sleep 1; done; exit 1"
            assert (await podman("run", "--rm", "--network", "inner", BUSYBOX_IMAGE, "sh", "-c", fetch)).out == "kept"
    finally:
        await podman("network", "rm", "-f", "inner")
        await podman("volume", "rm", "kept")


async def test_docker_socket_inside_the_guest(vm: ovm.OVM) -> None:
    """Tools that mount /var/run/docker.sock (ryuk, docker in docker) find an engine behind it."""
    argv = ["podman", "--remote", "--url", "unix:///var/run/docker.sock", "version", "--format", "{{.Server.Version}}"]
    answered = await vm.exec(argv, timeout_s=60)
    assert answered.text.startswith("5."), answered


async def test_engine_events(podman: Podman) -> None:
    """podman's own events tell what containers do."""
    await podman("run", "--rm", "--name", "seen", BUSYBOX_IMAGE, "true")
    transport = httpx2.AsyncHTTPTransport(uds=str(podman.machine.info.podman_socket))
    async with httpx2.AsyncClient(transport=transport, timeout=60) as client:
        told = (await client.get("http://d/v5.0.0/libpod/events?stream=false&since=5m")).text
    names = {(e["Actor"]["Attributes"].get("name"), e["Action"]) for e in map(json.loads, told.splitlines())}
    assert {("seen", "start"), ("seen", "died")} <= names


async def test_half_closed_connections_survive(podman: Podman) -> None:
    """What is piped into a container arrives whole, and its answer comes back after the end of the input."""
    lines = "".join(f"{number}\n" for number in range(20000)).encode()
    counted = await podman("run", "--rm", "-i", BUSYBOX_IMAGE, "wc", "-l", stdin=lines)
    assert counted.out == "20000"
