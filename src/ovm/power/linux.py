"""Sleep and wake as reported by systemd-logind, which delays a sleep while a delay inhibitor is held.

The inhibitor is an open file: closing it lets the host sleep. logind waits for at most InhibitDelayMaxSec.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from ovm.power.filter import Edges

if TYPE_CHECKING:
    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

log = logging.getLogger(__name__)

SLEEP_LIMIT_S = 4.0
"""Longest delay of a sleep."""
SHARE = 0.8
"""Share of logind's delay to use; the rest is for closing the inhibitor on a busy host."""
DEFAULT_DELAY_S = 5.0
"""logind's default InhibitDelayMaxSec."""
CALL_S = 5.0
RECONNECT_S = 30.0

LOGIND = "org.freedesktop.login1"
PATH = "/org/freedesktop/login1"
MANAGER = "org.freedesktop.login1.Manager"
SIGNAL = "PrepareForSleep"


async def watch(edges: Edges, *, bus_address: str | None = None) -> None:
    """Report logind's sleeps and wakes; return only if there is no logind.

    Args:
        edges: Gets every sleep and wake.
        bus_address: A D-Bus address. Default: ``DBUS_SYSTEM_BUS_ADDRESS``, or the usual system bus.
    """
    heard = False
    while True:
        try:
            async with _connect(bus_address) as logind:
                await logind.prepare()
                heard = True
                await logind.follow(edges)
        except Exception as error:  # noqa: BLE001  a bus fails in many ways, all with the same meaning
            log.debug("cannot get signals of logind: %r", error)
        if not heard:
            log.info("no logind; the host's sleep is detected only by its clock")
            return
        edges.stayed_awake()  # a wake during the lost connection would not be reported
        await asyncio.sleep(RECONNECT_S)


@contextlib.asynccontextmanager
async def _connect(bus_address: str | None) -> AsyncIterator[_Logind]:
    from dbus_fast import BusType
    from dbus_fast.aio import MessageBus

    bus = MessageBus(bus_address, BusType.SYSTEM, negotiate_unix_fd=True)
    async with asyncio.timeout(CALL_S):
        await bus.connect()
    logind = _Logind(bus)
    gone: asyncio.Future[None] = asyncio.ensure_future(bus.wait_for_disconnect())  # type: ignore[no-untyped-call]
    gone.add_done_callback(lambda _: logind.signals.put_nowait(None))
    try:
        yield logind
    finally:
        try:
            if bus.connected:
                bus.disconnect()
            await asyncio.wait({gone}, timeout=CALL_S)  # a reply that still arrives may bring an inhibitor
        finally:
            logind.over = True
            logind.release()
            if not gone.cancel() and not gone.cancelled():
                gone.exception()  # mark as retrieved: the lost connection is known


class _Logind:
    """A connection to the system bus, where logind may be missing."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._inhibitors: list[int] = []
        self.over = False
        self.signals: asyncio.Queue[Message | None] = asyncio.Queue()
        """The signals named SIGNAL; ``None`` when the connection is lost."""
        bus.add_message_handler(self._arrived)

    def _arrived(self, message: Message) -> None:
        """Take inhibitors and signals; a file in the reply to a cancelled call would otherwise stay open forever."""
        from dbus_fast import MessageType

        for fd in message.unix_fds:
            if message.message_type is MessageType.METHOD_RETURN and not self.over:
                os.set_inheritable(fd, False)  # a child that inherited it would delay every sleep
                self._inhibitors.append(fd)
            else:  # any process on the bus may send files
                os.close(fd)
        if message.message_type is MessageType.SIGNAL and (message.interface, message.member) == (MANAGER, SIGNAL):
            self.signals.put_nowait(message)

    async def prepare(self) -> None:
        """Subscribe to the signals, and take the inhibitor."""
        rule = f"type='signal',sender='{LOGIND}',path='{PATH}',interface='{MANAGER}',member='{SIGNAL}'"
        await self._ask_bus("AddMatch", rule)
        self._limit_s = min(SLEEP_LIMIT_S, SHARE * await self._delay_s())
        await self._inhibit()
        await self._ask_bus("GetNameOwner", LOGIND)  # fails if there is no logind

    async def follow(self, edges: Edges) -> None:
        """Report sleeps and wakes until the connection is lost."""
        log.debug("listening to logind; a sleep waits for up to %.1f s", self._limit_s)
        while (signal := await self.signals.get()) is not None:
            # a match rule does not authenticate: any process on the bus may send a signal of that name
            [owner] = await self._ask_bus("GetNameOwner", LOGIND)
            match signal:
                case _ if signal.sender != owner:
                    log.debug("ignored a signal from %s, which is not logind", signal.sender)
                case _ if signal.body == [True]:
                    try:
                        await edges.sleep(self._limit_s)
                    finally:
                        self.release()
                case _:
                    await self._inhibit()
                    edges.wake()

    def release(self) -> None:
        """Let the host sleep."""
        while self._inhibitors:
            os.close(self._inhibitors.pop())

    async def _inhibit(self) -> None:
        from dbus_fast import DBusError

        if self._inhibitors:
            return
        try:
            await self._call(LOGIND, PATH, MANAGER, "Inhibit", "sleep", "ovm", "pauses its virtual machine", "delay")
        except (DBusError, TimeoutError) as error:
            log.debug("cannot delay the host's sleep, only get its signals: %r", error)

    async def _delay_s(self) -> float:
        from dbus_fast import DBusError

        try:
            [delay] = await self._call(
                LOGIND, PATH, "org.freedesktop.DBus.Properties", "Get", MANAGER, "InhibitDelayMaxUSec"
            )
            return float(delay.value) / 1e6
        except DBusError:
            return DEFAULT_DELAY_S

    async def _ask_bus(self, member: str, argument: str) -> list[Any]:
        name = "org.freedesktop.DBus"
        return await self._call(name, "/org/freedesktop/DBus", name, member, argument)

    async def _call(self, destination: str, path: str, interface: str, member: str, *arguments: str) -> list[Any]:
        from dbus_fast import DBusError, Message, MessageType

        request = Message(destination, path, interface, member, signature="s" * len(arguments), body=list(arguments))
        async with asyncio.timeout(CALL_S):
            reply = await self._bus.call(request) if self._bus.connected else None
        if reply is None:
            raise ConnectionResetError("the connection to the bus is lost")
        if reply.message_type is MessageType.ERROR:
            raise DBusError(reply.error_name or "", str(reply.body))
        return list(reply.body)
