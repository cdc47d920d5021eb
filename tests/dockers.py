"""docker's own command line against a machine, its output and status as a test reads them."""

from __future__ import annotations

import os
from pathlib import Path

import under
from full import CLIENT_TIMEOUT_S, Ran, ran


class Docker:
    """The ``docker`` that is installed, with a home of its own."""

    def __init__(self, docker_host: str, home: Path) -> None:
        self._program = under.program("docker")
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "DOCKER_HOST": docker_host,
            "DOCKER_BUILDKIT": "0",
        }

    async def __call__(self, *arguments: str, check: bool = True, timeout: float = CLIENT_TIMEOUT_S) -> Ran:
        return await ran([self._program, *arguments], self._environment, check=check, timeout=timeout)
