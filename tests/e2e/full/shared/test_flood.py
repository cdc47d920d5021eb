"""B8 and B9: a container on the guest's network, or root in the guest, floods what the manager reads."""

from __future__ import annotations

import asyncio
import time

import pytest

import ovm
import soak
from full import BUSYBOX_IMAGE, Podman, eventually, fetch, running
from ovm.process import logs

pytestmark = pytest.mark.full

FLOODERS = 4
HELD = 300
"""Connections that each flooder keeps open, half of them with half a body."""
FLOOD = rf"""
$SIG{{PIPE}} = 'IGNORE';
my $order = '{{"local":"127.0.0.1:45455","remote":":80","protocol":"tcp"}}';
my $tried = 0;
my @held;
while (1) {{
    socket my $s, 2, 1, 0 or next;
    connect $s, pack 'S n C4 x8', 2, 80, 127, 0, 0, 1 or next;
    my $length = $tried++ % 2 ? 1000 : length $order;
    syswrite $s, "POST /services/forwarder/expose HTTP/1.0\r\nContent-Length: $length\r\n\r\n$order";
    syswrite STDOUT, "$tried\n" if $tried % 50 == 0;
    push @held, $s;
    shift @held if @held > {HELD};
}}
"""
SERVE = "echo hello > /tmp/hello; exec httpd -f -p 80 -h /tmp"
EXEC_S = 60.0


async def test_a_flood_keeps_neither_ports_nor_commands_from_working(vm: ovm.OVM, podman: Podman) -> None:
    """B8: while a container floods the announcements, ``podman run -p``, exec and health do their work."""
    script = f"cat >/tmp/flood <<'END'\n{FLOOD}END\n" + "perl /tmp/flood & " * FLOODERS + "wait"
    async with running(podman, "--network", "host", BUSYBOX_IMAGE, "sh", "-c", script) as flooder:

        async def floods() -> bool:
            return len((await podman("logs", flooder)).out.split()) >= FLOODERS

        await eventually(floods)
        async with running(podman, "-p", "18187:80", BUSYBOX_IMAGE, "sh", "-c", SERVE):

            async def is_served() -> bool:
                return await fetch(18187) == "hello"

            await eventually(is_served)
            assert (await vm.exec(["echo", "here"], timeout_s=EXEC_S)).text == "here"
            assert not (await vm.check_health()).problems
        assert await floods()
    assert 45455 not in {forward.host_port for forward in vm.ports()}


async def test_the_console_is_flooded_and_stays_small(vm: ovm.OVM, monkeypatch: pytest.MonkeyPatch) -> None:
    """B9: the console's log stays about as small as it is to be while root in the guest floods the console."""
    monkeypatch.setattr(logs, "SIZE_MAX_BYTES", 2 * logs.KEPT_BYTES)
    path = logs.log_path(vm.options.log_dir, "console")
    size, most, written, began = path.stat().st_size, 0, 0, time.monotonic()
    flood = asyncio.create_task(
        vm.exec(["timeout", "20", "sh", "-c", "yes $(seq 500) >/dev/console"], timeout_s=EXEC_S)
    )
    while not flood.done():
        await asyncio.sleep(0.1)
        now = path.stat().st_size
        written += max(0, now - size)
        size, most = now, max(most, now)
    speed = written / (time.monotonic() - began)
    soak.row("console.log under a flood", "2 s of it above the limit", f"{most} bytes at {speed:.0f} bytes/s")
    assert written > logs.SIZE_MAX_BYTES, "too little to show anything"
    assert most <= logs.SIZE_MAX_BYTES + 2 * speed + logs.KEPT_BYTES
    assert (await vm.exec(["echo", "here"], timeout_s=EXEC_S)).text == "here"
