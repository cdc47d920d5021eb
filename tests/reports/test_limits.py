"""What a container may do, compared with docker."""

from __future__ import annotations

import pytest

from dockers import Docker
from full import BUSYBOX_IMAGE

pytestmark = pytest.mark.full

DOCKERS = 0xA80425FB
"""docker's default capabilities, as CapEff shows them: moby's profiles/seccomp and oci/caps/defaults.go."""


async def test_root_has_dockers_capabilities(docker: Docker) -> None:
    """Root in a container has docker's default capabilities, and pings (containers/podman#5690)."""
    told = await docker("run", "--rm", BUSYBOX_IMAGE, "grep", "CapEff", "/proc/self/status")
    assert int(told.out.split()[1], 16) == DOCKERS
    await docker("run", "--rm", BUSYBOX_IMAGE, "busybox", "ping", "-c", "1", "127.0.0.1")


async def test_anybody_listens_on_low_ports(docker: Docker) -> None:
    """A container's user who is not root listens on port 80 and may ping, as with docker."""
    script = "cat /proc/sys/net/ipv4/ping_group_range; timeout -s KILL 2 nc -l -p 80 2>&1 | grep -i denied"
    told = await docker("run", "--rm", "-u", "1000", BUSYBOX_IMAGE, "busybox", "sh", "-c", script, check=False)
    assert told.out.split() == ["0", "2147483647"]
