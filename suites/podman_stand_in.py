"""What podman-py's tests start as ``podman``: its service is the machine's, whose socket is linked where they look."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """The three commands that the tests use."""
    version = os.environ["OVM_PODMAN_VERSION"]
    if "--version" in arguments:
        print(f"podman version {version}")
    elif "info" in arguments:
        print(version)
    elif "service" in arguments:
        Path(arguments[-1].removeprefix("unix://")).symlink_to(os.environ["OVM_PODMAN_SOCKET"])
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    else:
        print(f"podman here does not know {arguments}", file=sys.stderr)
        return 125
    return 0


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    sys.exit(main(sys.argv[1:]))
