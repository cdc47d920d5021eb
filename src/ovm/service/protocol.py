"""The requests over a service's socket, and the answers that only a service has. The names of fields are stable.

All other answers are the types of :mod:`ovm.model` that the library returns.
``API`` increases with a change that could break a client; an addition is none.
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
    """Status of the machine and its service; available in every state."""

    name: str
    state: VMState
    step: str
    """Latest step of a start or stop; empty while the machine runs."""
    health: Health | None
    """``None`` unless it runs."""
    restart_needed: list[str]
    """Settings that were changed since the start and take effect at the next start."""
    started_at: float
    """Start time of the service, in seconds since the epoch."""
    pid: int
    version: str
    """Version of ovm that the service runs."""
    api: int


class Stop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shut the guest down."""

    force: bool = False
    """Cut its power at once."""
    timeout_s: Seconds = msgspec.field(default=STOP_TIMEOUT_S)
    """Time for the guest to shut down before its power is cut, in seconds."""


class Suspend(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Save the machine's state on disk, and end every process."""

    timeout_s: Seconds = msgspec.field(default=SUSPEND_TIMEOUT_S)
    """Timeout of the hypervisor's save, in seconds."""


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a stop or a suspend."""

    state: VMState = VMState.STOPPED


class Reset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Stop the machine, restore its files, and start it again."""

    data: bool = False
    """Delete the data disk too, with every image, container and volume."""


class PortWanted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host port to forward to a guest port."""

    guest_port: Port
    host_port: PortOrAny = 0
    """0 picks a free port."""
    protocol: Protocol = "tcp"
    address: str = "127.0.0.1"


class PortUnwanted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host port whose forward to remove."""

    host_port: Port
    protocol: Protocol = "tcp"
    address: str = "127.0.0.1"


class Exec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command to run as root in the guest, without a shell."""

    argv: list[str]
    stdin: bytes = b""
    """The command's standard input; base64 in JSON."""
    environment: dict[str, str] = {}
    timeout_s: Seconds | None = None


class Piece(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of a command's answer: output in base64, or in the last line how it ended."""

    stdout: bytes = b""
    stderr: bytes = b""
    exit_status: int | None = None
    """Exit status; 128 + the signal's number if a signal ended the command."""
    error: OVMError | None = None
    """Instead of ``exit_status``: why the exit status is unknown."""


class Prune(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Delete unused podman data."""

    everything: bool = False
    volumes: bool = False


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request failed."""

    error: dict[str, Any]
    """``code`` and ``message``; also ``hint``, ``stage``, ``exit_reason`` and ``log_tail`` unless empty."""
