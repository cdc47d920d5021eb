"""Containers with a restart policy, over a stop, a start and a power cut."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ovm
import under
from dockers import Docker
from full import BUSYBOX_IMAGE, busybox_tar, eventually

pytestmark = pytest.mark.full

UP = ("always", "kept")
DOWN = ("quit", "never")
SLEEP = (BUSYBOX_IMAGE, "sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait")


async def states(docker: Docker) -> dict[str, str]:
    """The state of each container by its name."""
    listed = (await docker("ps", "-a", "--format", "{{.Names}}\t{{.Status}}")).out
    return {name: status for name, _, status in (line.partition("\t") for line in listed.splitlines())}


async def test_restart_policies(options_for: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """Each comes back as docker brings it back, though one cannot, which says why and starts once its port is free.

    containers/podman#17580, #20418: one container that fails at boot ended all others.
    """
    machine = await under.create(options_for("restarts"))
    errors: list[ovm.OVMError] = []
    machine.on("error", errors.append)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    try:
        await machine.start()
        docker = Docker(machine.info.docker_host, tmp_path)
        await docker("import", str(busybox_tar(tmp_path / "busybox.tar")), BUSYBOX_IMAGE)
        for name, *policy in (
            ("always", "--restart=always"),
            ("kept", "--restart=unless-stopped"),
            ("quit", "--restart=unless-stopped"),
            ("never",),
            ("port", "--restart=always", "-p", f"{port}:80"),
        ):
            await docker("run", "-d", "--name", name, *policy, *SLEEP)
        await docker("stop", "quit")
        await machine.stop()

        with socket.create_server(("127.0.0.1", port)):
            await machine.start()

            async def all_but_one() -> bool:
                found = await states(docker)
                return all(found[name].startswith("Up") for name in UP)

            await eventually(all_but_one, timeout_s=120)

            async def reported() -> bool:
                problems = (await machine.check_health()).problems
                return any("container port is not started" in problem and str(port) in problem for problem in problems)

            await eventually(reported)
            found = await states(docker)
            assert all(found[name].startswith("Exited (0)") and "292 years" not in found[name] for name in DOWN), found
            assert not found["port"].startswith("Up")
            (refused,) = [error for error in errors if isinstance(error, ovm.PortError)]
            assert str(port) in refused.message

        async def well_again() -> bool:
            return (await states(docker))["port"].startswith("Up") and (await machine.check_health()).ok

        await eventually(well_again)

        await machine.stop(force=True)
        await machine.start()

        async def back() -> bool:
            found = await states(docker)
            return all(found[name].startswith("Up") for name in (*UP, "port"))

        await eventually(back)
        found = await states(docker)
        assert all(found[name].startswith("Exited") for name in DOWN), found
    finally:
        await machine.stop(force=True)
