"""The exceptions that ovm raises.

::

    OVMError
    ├── InputError            refused before any change (also a ValueError)
    │   ├── OptionError       an option is unknown, missing or out of range
    │   ├── SettingsError     a machine's settings are invalid; the message names the line
    │   ├── FileError         a given file or directory is missing, unreadable or of the wrong kind
    │   │   └── UntrustedError  another user created it, or could change it
    │   ├── ArchiveError      an archive is damaged or hostile
    │   ├── HelperError       a helper program is missing, not executable or too old
    │   ├── SocketPathError   a socket's path would not fit the kernel's limit
    │   └── UnsupportedError  this host or hypervisor does not support the request
    ├── StateError            the machine's state does not allow the call
    ├── InUseError            another process owns the directory
    ├── SpaceError            the file system is full
    ├── PortError             a host port could not be bound, or is not exported
    ├── StartError            the start failed; names the stage and the reason
    │   ├── HelperExited      a helper process ended unexpectedly
    │   ├── NotReadyError     the guest was not ready within its deadline
    │   └── GuestRefused      the guest reported that it cannot continue
    ├── GuestError            the running guest could not be reached, or a request to it failed
    │   ├── HostKeyMismatch   sshd answered with a host key other than the pinned one
    │   └── ExecTimeout       a command in the guest exceeded its timeout
    ├── StopError             the machine could not be stopped
    ├── SkewError             the machine's service runs an incompatible version of ovm
    └── ImageError            a guest image is damaged, unknown, or could not be built or fetched

Every class has a stable ``code`` for programs. Every instance has a message for people, a ``hint``
(what to do next) and evidence. Only the command line turns these into an exit status.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ovm.text.printable import printable


class OVMError(Exception):
    """The base class of all errors that ovm raises on purpose."""

    code: ClassVar[str] = "ovm"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        stage: str = "",
        exit_reason: str = "",
        log_tail: tuple[str, ...] = (),
    ) -> None:
        message = printable(message)  # it may contain text from a guest or a server
        super().__init__(message)
        self.message = message
        """What failed, in one sentence."""
        self.hint = printable(hint)
        """What to do next; may be empty."""
        self.stage = stage
        """The step of a start or stop that failed; empty outside of one."""
        self.exit_reason = printable(exit_reason)
        """How a program ended ("exit status 1", "killed by SIGKILL"); empty if none did."""
        self.log_tail = tuple(printable(line) for line in log_tail)
        """The last lines of the relevant log, oldest first."""

    def __str__(self) -> str:
        lines = [self.message]
        if self.stage:
            lines[0] += f" (stage: {self.stage})"
        if self.exit_reason:
            lines.append(f"  it ended: {self.exit_reason}")
        lines += [f"  | {line}" for line in self.log_tail]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """Return the error for programs: ``code``, ``message`` and all evidence that is not empty."""
        evidence: dict[str, object] = {
            "hint": self.hint,
            "stage": self.stage,
            "exit_reason": self.exit_reason,
            "log_tail": list(self.log_tail),
        }
        return {"code": self.code, "message": self.message} | {k: v for k, v in evidence.items() if v}


class InputError(OVMError, ValueError):
    """The input is invalid. Nothing was changed."""

    code = "invalid-input"


class OptionError(InputError):
    """An option is unknown, missing or out of range."""

    code = "invalid-option"


class SettingsError(InputError):
    """A machine's settings are invalid; the message begins with the file and the line."""

    code = "invalid-settings"


class FileError(InputError):
    """A given file or directory is missing, unreadable or of the wrong kind."""

    code = "invalid-file"


class UntrustedError(FileError):
    """Another user of the host created a directory or socket, or could change it; the message names it."""

    code = "untrusted"


class ArchiveError(InputError):
    """An archive is damaged or hostile: it has entries that must not be extracted."""

    code = "invalid-archive"


class HelperError(InputError):
    """gvproxy, the hypervisor or virtiofsd is missing, not executable or too old."""

    code = "helper-unusable"


class SocketPathError(InputError):
    """A socket's path exceeds the kernel's limit (103 bytes on macOS, 107 on Linux)."""

    code = "socket-path-too-long"


class UnsupportedError(InputError):
    """This host or this hypervisor does not support the request."""

    code = "unsupported"


class StateError(OVMError):
    """The machine's state does not allow the call; the hint says what to do first."""

    code = "wrong-state"


class InUseError(OVMError):
    """Another process owns the directory; the message names it."""

    code = "in-use"


class SpaceError(OVMError):
    """The file system has too little free space; the message says how much is needed."""

    code = "no-space"


class PortError(OVMError):
    """A host port could not be bound, or was not exported."""

    code = "port"


class StartError(OVMError):
    """The start failed. ``stage``, ``exit_reason`` and ``log_tail`` say where and why. Nothing is left running."""

    code = "start-failed"


class HelperExited(StartError):
    """A helper process ended unexpectedly."""

    code = "helper-exited"


class NotReadyError(StartError):
    """The guest was not ready within its deadline."""

    code = "guest-not-ready"


class GuestRefused(StartError):
    """The guest reported that it cannot continue, for example with a damaged data disk."""

    code = "guest-refused"


class GuestError(OVMError):
    """The running guest could not be reached, or a request to it failed."""

    code = "guest-error"


class HostKeyMismatch(GuestError):
    """sshd answered with a host key other than the pinned one."""

    code = "host-key-mismatch"


class ExecTimeout(GuestError):
    """A command in the guest exceeded its timeout."""

    code = "exec-timeout"


class StopError(OVMError):
    """The machine could not be stopped; the message says what is still running."""

    code = "stop-failed"


class SkewError(OVMError):
    """The machine's service runs an incompatible version of ovm."""

    code = "version-skew"


class ImageError(OVMError):
    """A guest image is damaged, unknown, or could not be built or fetched."""

    code = "image"


def from_dict(told: Mapping[str, Any]) -> OVMError:
    """Return the error that :meth:`OVMError.as_dict` described; an ``OVMError`` if the code is unknown."""
    kinds, code = {OVMError.code: OVMError}, told.get("code")
    below = [OVMError]
    while below:
        for kind in below.pop().__subclasses__():
            kinds[kind.code] = kind
            below.append(kind)
    return kinds.get(str(code), OVMError)(
        str(told.get("message", code)),
        hint=str(told.get("hint", "")),
        stage=str(told.get("stage", "")),
        exit_reason=str(told.get("exit_reason", "")),
        log_tail=tuple(map(str, told.get("log_tail", ()))),
    )


def first_error(error: BaseException) -> BaseException:
    """Return the first exception of a task group that is not a group itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
