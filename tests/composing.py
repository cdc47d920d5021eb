"""docker compose v2, built from its module once: Debian 12 has only the first one."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import built
import doubles

SOURCES = Path(__file__).parent / "compose"
MODULE = "github.com/docker/compose/v2"
BUILD = ("-trimpath", "-ldflags", "-s -w")


@functools.cache
def compose() -> Path:
    """The program ``docker-compose``; its version is the one in tests/compose/go.mod."""
    sums = hashlib.sha256((SOURCES / "go.sum").read_bytes()).hexdigest()[:16]
    directory = doubles.TOOLS / f"compose-{sums}"
    with built.once(directory, "compose") as missing:
        if missing:
            environment = os.environ | {"GOFLAGS": "-mod=readonly", "CGO_ENABLED": "0", "GOTOOLCHAIN": "auto"}
            with built.whole(directory) as new:
                where = ["-C", os.fspath(SOURCES), "build", *BUILD, "-o", os.fspath(new / "docker-compose")]
                doubles.run([doubles.go(), *where, f"{MODULE}/cmd"], env=environment)
    return directory / "docker-compose"


@contextlib.contextmanager
def meanwhile() -> Iterator[None]:
    """It is built by what others leave of the processors: that takes minutes, which would else be waited for."""
    with subprocess.Popen([sys.executable, __file__], start_new_session=True) as building:
        # Waited for at its end, not at ours: the tests in between let no zombie pass.
        waiting = threading.Thread(target=building.wait)
        waiting.start()
        try:
            yield
        finally:
            if building.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(building.pid, signal.SIGTERM)
            waiting.join()


if __name__ == "__main__":
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    compose()
