"""What a guest is told at boot, of the options it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ovm.guest.bootconfig import BootConfig
from ovm.machine import instructions
from ovm.model.options import Options, OriginPath, Versions

IDENTITY = {"authorized_key": "a", "host_key": "b", "host_key_public": "c", "machine_id": "d", "channel_key": ""}


def told(**more: Any) -> BootConfig:
    origins = {name: Path(f"/origin/{name}") for name in ("gvproxy", "kernel", "initrd", "rootfs")}
    directories = {name: Path(f"/{name}") for name in ("target_dir", "socket_dir", "log_dir", "ssh_key_dir")}
    options = Options(
        origin_path=OriginPath(**origins),
        versions=Versions(**dict.fromkeys(origins, "1")),
        mounts=(),
        **directories,
        **more,
    )
    return instructions.configure(options, **IDENTITY)


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ({"environment": {"A": "b"}}, {"A": "b"}),
        ({"ssh_agent": True}, {"SSH_AUTH_SOCK": "/run/ovm/ssh-agent.sock"}),
        ({"ssh_agent": True, "environment": {"SSH_AUTH_SOCK": "/mine"}}, {"SSH_AUTH_SOCK": "/mine"}),
    ],
)
def test_programs_are_told_of_the_agent_that_is_lent(options: dict[str, Any], environment: dict[str, str]):
    """Only if it is; and what was said in so many words is stronger."""
    assert told(**options).environment == environment


def test_name_servers():
    """They are told as given; none means that the network's own are asked."""
    assert told(dns=("192.0.2.2", "192.0.2.1")).name_servers == ("192.0.2.2", "192.0.2.1")
    assert told().name_servers == ()
