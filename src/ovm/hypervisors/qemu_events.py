"""QEMU's unprompted QMP events, as :class:`ovm.hypervisors.Happening`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from ovm.hypervisors import Happening, Watcher
from ovm.model.states import VMState
from ovm.text.printable import GuestText

if TYPE_CHECKING:
    from qemu.qmp import Message, QMPClient

STATUS_TIMEOUT_S = 10.0
IO_ERROR = "io-error"
_DISK_ERROR_WORDS = {"node-name": "", "reason": "I/O error"}
"""Fields of a BLOCK_IO_ERROR in the message, with their defaults."""

STATES = {
    "running": VMState.RUNNING,
    "paused": VMState.PAUSED,
    "suspended": VMState.PAUSED,
    "prelaunch": VMState.STARTING,
    "inmigrate": VMState.RESTORING,
    "postmigrate": VMState.PAUSED,
    "finish-migrate": VMState.SAVING,
    "save-vm": VMState.SAVING,
    "restore-vm": VMState.RESTORING,
    "shutdown": VMState.STOPPED,
}
"""State by QEMU's RunState; all others (internal-error, io-error, guest-panicked, watchdog, colo) are errors."""


class Status(msgspec.Struct):
    """The answer to QMP's query-status."""

    status: str


async def watch(qmp: QMPClient, watcher: Watcher) -> None:
    """Call ``watcher`` for each relevant event of QEMU."""
    disk: tuple[Happening, str] | None = None
    status = await _failure(qmp)
    # QEMU sends no event for a stop before the connection; the event of a later stop arrived before the answer
    if status and all(event["event"] != "STOP" for event in qmp.events.history):
        watcher(*_stopped(status))
    async for event in qmp.events:
        if failure := disk_failure(event):
            if failure[0] is Happening.DISK_ERROR:
                watcher(*failure)
            else:
                disk = failure
        if event["event"] == "STOP" and (status := await _failure(qmp)):
            watcher(*(disk if disk and status == IO_ERROR else _stopped(status)))
        elif happening := translate(event):
            watcher(*happening)


def _stopped(status: str) -> tuple[Happening, str]:
    return Happening.FAILED, f"QEMU stopped the guest: {GuestText(status)}"


async def _failure(qmp: QMPClient) -> str:
    """Return QEMU's status if it stopped the guest because of a failure; else an empty text."""
    from qemu.qmp import QMPError

    try:
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            answer = msgspec.convert(await qmp.execute("query-status"), Status)
    except (QMPError, OSError, asyncio.IncompleteReadError, TimeoutError):  # it is ending, as reported elsewhere
        return ""
    except msgspec.ValidationError as error:
        return f"unknown status: {GuestText.of(error)}"
    return "" if answer.status in STATES else answer.status


def data(event: Message) -> dict[str, Any]:
    """Return the data of an event."""
    told = event.get("data")
    return told if isinstance(told, dict) else {}


def disk_failure(event: Message) -> tuple[Happening, str] | None:
    """Translate a disk error that stops the guest or is reported to it; ``None`` for other events."""
    told = data(event)
    if event["event"] != "BLOCK_IO_ERROR" or told.get("action") not in {"stop", "report"}:
        return None
    name, reason = (GuestText(str(told.get(key, other))) for key, other in _DISK_ERROR_WORDS.items())
    words = f"the disk {name} failed: {reason}"
    if told["action"] == "report":
        return Happening.DISK_ERROR, words
    return (Happening.OUT_OF_SPACE if told.get("nospace") else Happening.FAILED), words


def translate(event: Message) -> tuple[Happening, str] | None:
    """Translate a QMP event; ``None`` for irrelevant ones."""
    told = data(event)
    match event["event"]:
        case "STOP":
            return Happening.PAUSED, ""
        case "RESUME":
            return Happening.RESUMED, ""
        case "RESET" if told.get("guest"):
            return Happening.REBOOTED, str(told.get("reason", ""))
        case "SHUTDOWN" if told.get("guest"):
            return Happening.POWERED_OFF, str(told.get("reason", ""))
        case _:
            return None
