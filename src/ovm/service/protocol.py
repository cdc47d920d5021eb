"""Every request over a service's socket, and the answers that only a service has. The names of fields stay.

All other answers are the types of :mod:`ovm.model` that the library returns, as they are.
Additions are no new API; whatever a client could trip over is, and gets the next number.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from ovm.errors import OVMError
from ovm.model.defaults import STOP_TIMEOUT_S, SUSPEND_TIMEOUT_S
from ovm.model.info import Health
from ovm.model.ports import Protocol
from ovm.model.states import VMState
from ovm.model.validation import PORT_MAX, SECONDS_MAX

API = 1

Seconds = Annotated[float, msgspec.Meta(ge=0, le=SECONDS_MAX)]
Port = Annotated[int, msgspec.Meta(ge=1, le=PORT_MAX)]
PortOrAny = Annotated[int, msgspec.Meta(ge=0, le=PORT_MAX)]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and the service that holds it; answered in every state."""

    name: str
    state: VMState
    step: str
    """What a start or stop has last done; empty while the machine runs."""
    health: Health | None
    """``None`` unless it runs."""
    restart_needed: list[str]
    """Settings changed since the start; they take effect at the next one."""
    started_at: float
    """When the service began, in seconds since the epoch."""
    pid: int
    version: str
    """Of the package that the service was started from."""
    api: int


class Stop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shut the guest down."""

    force: bool = False
    """Cut its power at once."""
    timeout_s: Seconds = msgspec.field(default=STOP_TIMEOUT_S)
    """How long it may take to shut down, in seconds."""


class Suspend(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keep the guest's memory on disk, and end every process."""

    timeout_s: Seconds = msgspec.field(default=SUSPEND_TIMEOUT_S)
    """How long the hypervisor may take for it, in seconds."""


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """What a stop or a suspend comes to."""

    state: VMState = VMState.STOPPED


class Reset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Stop the machine, restore its files, and start it again."""

    data: bool = False
    """Remove the data disk too, and with it every image, container and volume."""


class PortWanted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A port of the host that is to lead to one of the guest."""

    guest_port: Port
    host_port: PortOrAny = 0
    """0 picks a free one."""
    protocol: Protocol = "tcp"
    address: str = "127.0.0.1"


class PortUnwanted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A port of the host that is to be closed."""

    host_port: Port
    protocol: Protocol = "tcp"
    address: str = "127.0.0.1"


class Exec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command to run as root in the guest; no shell comes between."""

    argv: list[str]
    stdin: bytes = b""
    """What it reads; base64 in JSON."""
    environment: dict[str, str] = {}
    timeout_s: Seconds | None = None


class Piece(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of what a command sends back: output, in base64, or how it ended, which is the last one."""

    stdout: bytes = b""
    stderr: bytes = b""
    exit_status: int | None = None
    """128 + the signal's number if a signal ended it."""
    error: OVMError | None = None
    """Instead of an end: why nobody knows how it ended."""


class Prune(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Have podman remove what nothing uses."""

    everything: bool = False
    volumes: bool = False


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request was not fulfilled."""

    error: dict[str, Any]
    """``code``, ``message`` and whatever else is known: ``hint``, ``stage``, ``exit_reason``, ``log_tail``."""
