"""docker's own command line against a machine, its output and status as a test reads them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import under
from full import CLIENT_TIMEOUT_S, Ran


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
        process = await asyncio.create_subprocess_exec(
            self._program,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        try:
            async with asyncio.timeout(timeout):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        ran = Ran(process.returncode, out.decode(errors="replace").strip(), err.decode(errors="replace").strip())
        if check:
            assert ran.status == 0, f"docker {' '.join(arguments)}: {ran.err or ran.out}"
        return ran
