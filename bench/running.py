"""What a running machine is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from functools import partial

import ovm
from bench.samples import alternate, timed
from bench.setting import Bench
from ovm.model.ports import join
from ovm.network.gvproxy import GUEST_ADDRESS, free_port
from ovm.paths import SocketPaths
from ovm.wire import http

ROWS = (
    "pause",
    "resume, clock set",
    "clock offset after resume",
    "export_port",
    "to an exported port",
    "to gvproxy's own",
)
PAUSED_S = 0.2
GUEST_PORT = 9000
LOOPBACK = "127.0.0.1"
CHUNK = bytes(1 << 18)
STREAM_DEADLINE_S = 120.0
LISTENS_DEADLINE_S = 30.0


async def measure(bench: Bench, machine: ovm.OVM) -> None:
    """All of it, of a machine that runs."""
    bench.tell("pausing and resuming")
    for run in range(-bench.scale.warm_ups, bench.scale.resumes):
        await asyncio.sleep(bench.scale.rested_s)
        paused = await timed(machine.vm_pause())
        await asyncio.sleep(PAUSED_S)
        resumed = await timed(machine.vm_resume())
        left = abs((await machine.clocksync()).offset_before_s) * 1000
        if run >= 0:
            for row, ms in zip(ROWS[:3], (paused, resumed, left), strict=True):
                bench.recorder.add(row, ms)

    bench.tell("opening ports")
    for run in range(-bench.scale.warm_ups, bench.scale.commands):
        begun = time.perf_counter()
        forward = await machine.export_port(0, GUEST_PORT)
        ms = (time.perf_counter() - begun) * 1000
        await machine.unexport_port(forward.host_port)
        if run >= 0:
            bench.recorder.add("export_port", ms)

    bench.tell("sending to the guest")
    async with _counting(machine), _forwards(machine) as (ours, raw):
        size = bench.scale.stream_mib << 20
        sides = {row: partial(_throughput, port, size) for row, port in zip(ROWS[4:], (ours, raw), strict=True)}
        await alternate(
            sides, bench.recorder, runs=bench.scale.streams, warm_ups=bench.scale.warm_ups, unit="MiB/s"
        )  # fmt: skip


@contextlib.asynccontextmanager
async def _counting(machine: ovm.OVM) -> AsyncIterator[None]:
    """Something in the guest that takes what it is sent, and says at the end how many bytes that was."""
    async with machine.process(["busybox", "nc", "-ll", "-p", str(GUEST_PORT), "-e", "wc", "-c"]):
        yield


@contextlib.asynccontextmanager
async def _forwards(machine: ovm.OVM) -> AsyncIterator[tuple[int, int]]:
    """Two ports of the host that lead to it: one by ovm, and one that gvproxy itself was asked for."""
    api_socket = SocketPaths(machine.options.socket_dir).network_api
    ours = await machine.export_port(0, GUEST_PORT)
    try:
        async with http.connect(api_socket) as api:
            raw = await asyncio.to_thread(free_port, "tcp", LOOPBACK, 0)
            assert raw is not None
            local = {"local": join(LOOPBACK, raw), "protocol": "tcp"}
            await api.post("/services/forwarder/expose", local | {"remote": join(GUEST_ADDRESS, GUEST_PORT)})
            try:
                await _listens(raw)
                yield ours.host_port, raw
            finally:
                await api.post("/services/forwarder/unexpose", local)
    finally:
        await machine.unexport_port(ours.host_port)


async def _listens(port: int) -> None:
    """Until the guest's end answers; gvproxy accepts before."""
    until = time.monotonic() + LISTENS_DEADLINE_S
    while await asyncio.to_thread(_send, port, 1) != 1:
        if time.monotonic() > until:
            raise ConnectionError("nothing listens in the guest")


async def _throughput(port: int, size: int) -> float:
    """MiB per second, from the connect until the guest has told that it has all of them."""
    begun = time.perf_counter()
    taken = await asyncio.to_thread(_send, port, size)
    seconds = time.perf_counter() - begun
    if taken != size:
        raise ConnectionError(f"the guest has {taken} of {size} bytes")
    return size / seconds / (1 << 20)


def _send(port: int, size: int) -> int:
    """Send so many bytes; returns how many the guest says have arrived."""
    with socket.create_connection((LOOPBACK, port), STREAM_DEADLINE_S) as connection:
        answer = b""
        with contextlib.suppress(OSError):  # what arrived is what counts
            for at in range(0, size, len(CHUNK)):
                connection.sendall(memoryview(CHUNK)[: size - at])
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(64):
                answer += piece
        return int(answer or b"0")
