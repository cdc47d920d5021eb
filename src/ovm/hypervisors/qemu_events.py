"""What QEMU reports of its own accord over QMP, in our words."""

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
"""Of a BLOCK_IO_ERROR: what is told of it, and what instead where it is missing."""

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
"""By QEMU's RunState; the rest (internal-error, io-error, guest-panicked, watchdog, colo) are errors."""


class Status(msgspec.Struct):
    """Of QMP's query-status."""

    status: str


async def watch(qmp: QMPClient, watcher: Watcher) -> None:
    """Pass on what QEMU reports, in our words."""
    disk: tuple[Happening, str] | None = None
    status = await _failure(qmp)
    # QEMU sends no event of a stop before we were connected; one since then has arrived ahead of the answer
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
    return Happening.FAILED, f"QEMU has stopped it: {GuestText(status)}"


async def _failure(qmp: QMPClient) -> str:
    """QEMU's word for what made it stop the guest; empty if it was asked to."""
    from qemu.qmp import QMPError

    try:
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            answer = msgspec.convert(await qmp.execute("query-status"), Status)
    except (QMPError, OSError, asyncio.IncompleteReadError, TimeoutError):  # it is ending: that is told elsewhere
        return ""
    except msgspec.ValidationError as error:
        return f"its status cannot be told: {GuestText.of(error)}"
    return "" if answer.status in STATES else answer.status


def data(event: Message) -> dict[str, Any]:
    """What an event says besides its name."""
    told = event.get("data")
    return told if isinstance(told, dict) else {}


def disk_failure(event: Message) -> tuple[Happening, str] | None:
    """What a disk's error says, whether the guest is about to be stopped for it or told; ``None`` for anything else."""
    told = data(event)
    if event["event"] != "BLOCK_IO_ERROR" or told.get("action") not in {"stop", "report"}:
        return None
    name, reason = (GuestText(str(told.get(key, other))) for key, other in _DISK_ERROR_WORDS.items())
    words = f"the disk {name} failed: {reason}"
    if told["action"] == "report":
        return Happening.DISK_ERROR, words
    return (Happening.OUT_OF_SPACE if told.get("nospace") else Happening.FAILED), words


def translate(event: Message) -> tuple[Happening, str] | None:
    """A QMP event in our words; ``None`` for what does not matter to us."""
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
