"""What root in the guest can do to the host, and what keeps it from more."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

import listeners
import tiny
import under
from ovm.paths import LOCK, SocketPaths
from ovm.process import confine
from processes import holders

pytestmark = pytest.mark.tiny

confined = pytest.mark.skipif(not confine.available(), reason="this host confines nothing")


async def ask(machine: tiny.Machine, path: str, body: dict[str, str]) -> str:
    """What gvproxy's API answers to root in the guest, where no firewall is: the status line."""
    text = json.dumps(body)
    header = f"POST /services/forwarder/{path} HTTP/1.0\\r\\nContent-Length: {len(text)}\\r\\n\\r\\n"
    answer = await machine.tell(f"printf '{header}%s' '{text}' | busybox nc 192.168.127.1 80")
    return answer.splitlines()[0].strip()


def unix(path: Path) -> dict[str, str]:
    return {"protocol": "unix", "local": str(path), "remote": "tcp://192.168.127.2:22"}


@confined
async def test_the_guest_cannot_touch_the_users_files(machines: tiny.Machines, short_path: Path) -> None:
    """gvproxy removes what lies where its sockets are to be: nothing but in its own directory (B11, B12).

    It does its work all the same: there it makes sockets, it forwards ports, and names are looked up.
    """
    machine = await machines()
    await machine.ovm.start()
    precious, data = short_path / "precious", machine.ovm.options.target_dir / "data.img"
    precious.write_text("precious")
    (short_path / "empty").mkdir()
    sockets = SocketPaths(machine.ovm.options.socket_dir)
    ours = (sockets.directory / LOCK, sockets.service, sockets.ready, sockets.network_api, sockets.helpers)
    for path in (precious, data, short_path / "new", short_path / "empty", Path.home() / ".ovm-test", *ours):
        before = path.exists()
        assert "500" in await ask(machine, "expose", unix(path)), path
        assert path.exists() == before
    assert precious.read_text() == "precious"
    assert "200" in await ask(machine, "expose", unix(sockets.gvproxy / "own"))
    assert "200" in await ask(machine, "unexpose", unix(sockets.gvproxy / "own"))
    looked_up = await machine.tell("busybox nslookup gateway.containers.internal 192.168.127.1")
    assert "192.168.127.1" in looked_up.rpartition("gateway.containers.internal")[2]
    if not under.MAC:
        assert "NoNewPrivs:\t1\n" in Path(f"/proc/{machine.helper('gvproxy')}/status").read_text()


@under.QEMU_ALONE
async def test_the_guest_could_if_gvproxy_were_not_confined(
    machines: tiny.Machines, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host cannot confine, the file is gone: so the test above would see it."""
    monkeypatch.setattr(confine, "available", lambda: False)
    machine = await machines()
    await machine.ovm.start()
    precious = short_path / "precious"
    precious.write_text("precious")
    assert "200" in await ask(machine, "expose", unix(precious))
    assert precious.is_socket()
    assert "200" in await ask(machine, "unexpose", unix(precious))


@pytest.mark.skipif(under.MAC, reason="it reads /proc")
async def test_nothing_listens_that_is_not_told(machines: tiny.Machines) -> None:
    """One port, on the loopback, for ssh; unix sockets in the machine's own directory; all are gone afterwards."""
    machine = await machines()
    before = listeners.ports([os.getpid()])
    await machine.ovm.start()
    helpers = holders(machines.root)
    assert len(helpers) >= 3
    assert listeners.ports([os.getpid()]) == before
    ssh = machine.ovm.info.ssh_port
    assert listeners.ports(helpers) == {("tcp", "127.0.0.1", ssh)}
    found = listeners.unix(helpers)
    doubles_own = {path for path in found if "/vfkit-double-" in path}  # to command the QEMU underneath
    own = SocketPaths(machine.ovm.options.socket_dir)
    directories = {Path(path).parent for path in found - doubles_own}
    assert own.gvproxy in directories
    assert directories <= {own.directory, own.gvproxy}
    exported = await machine.ovm.export_port(0, 22)
    assert await tiny.tell(exported.host_port, "echo there") == "there\n"
    assert listeners.ports(helpers) == {("tcp", "127.0.0.1", ssh), ("tcp", "127.0.0.1", exported.host_port)}
    assert listeners.unix(helpers) == found
    await machine.ovm.stop()
    for port in (ssh, exported.host_port):
        with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
            probe.connect(("127.0.0.1", port))
