"""What can go wrong, as types.

::

    OVMError
    ├── InputError            refused before anything was changed (also a ValueError)
    │   ├── OptionError       an option is unknown, missing or out of range
    │   ├── SettingsError     a machine's settings say something that cannot be; with its line
    │   ├── FileError         a given file or directory is missing, unreadable or of the wrong kind
    │   │   └── UntrustedError  another user made it, or could change it
    │   ├── ArchiveError      an archive is damaged or hostile
    │   ├── HelperError       a helper program is missing, not executable or too old
    │   ├── SocketPathError   a socket's path would not fit the kernel's limit
    │   └── UnsupportedError  this host or hypervisor cannot do what was asked
    ├── StateError            the call does not fit the machine's present state
    ├── InUseError            another process owns the directory
    ├── SpaceError            the disk has too little room
    ├── PortError             a host port could not be bound, or is not exported
    ├── StartError            the start failed; says at which stage, and why
    │   ├── HelperExited      a helper ended although nobody had asked it to
    │   ├── NotReadyError     the guest was not ready within its deadline
    │   └── GuestRefused      the guest itself reported that it cannot go on
    ├── GuestError            the running guest could not be reached or did not do as asked
    │   ├── HostKeyMismatch   sshd answered with a host key other than the pinned one
    │   └── ExecTimeout       a command in the guest ran past its deadline
    ├── StopError             the machine could not be stopped
    ├── SkewError             the service of a machine is of another version of ovm
    └── ImageError            a guest image is damaged, unknown, or could not be built or fetched

Every class has a stable ``code`` for programs; every instance a message for people, a ``hint``
(what to do next) and the evidence it was made from. Only the command line turns these into an exit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ovm.text.printable import printable


class OVMError(Exception):
    """The base of everything ovm raises on purpose."""

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
        message = printable(message)  # its evidence may be the words of a guest or a server
        super().__init__(message)
        self.message = message
        """What failed, in one sentence."""
        self.hint = printable(hint)
        """What to do next; empty where there is nothing to advise."""
        self.stage = stage
        """The step of a start or stop at which it happened; empty outside of one."""
        self.exit_reason = printable(exit_reason)
        """How a helper ended ("exit status 1", "killed by SIGKILL"); empty if none did."""
        self.log_tail = tuple(printable(line) for line in log_tail)
        """The last lines of the log that tells about it, oldest first."""

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
        """The same for programs: ``code``, ``message`` and whatever evidence there is."""
        evidence: dict[str, object] = {
            "hint": self.hint,
            "stage": self.stage,
            "exit_reason": self.exit_reason,
            "log_tail": list(self.log_tail),
        }
        return {"code": self.code, "message": self.message} | {k: v for k, v in evidence.items() if v}


class InputError(OVMError, ValueError):
    """What was given cannot be used. Nothing has been changed."""

    code = "invalid-input"


class OptionError(InputError):
    """An option is unknown, missing or out of range."""

    code = "invalid-option"


class SettingsError(InputError):
    """A machine's settings cannot be understood; the message begins with the file and the line."""

    code = "invalid-settings"


class FileError(InputError):
    """A given file or directory is missing, unreadable or of the wrong kind."""

    code = "invalid-file"


class UntrustedError(FileError):
    """Another user of the host made a directory or socket, or could change it; the message says which."""

    code = "untrusted"


class ArchiveError(InputError):
    """An archive is damaged, or would write where or what it must not."""

    code = "invalid-archive"


class HelperError(InputError):
    """gvproxy, the hypervisor or virtiofsd is missing, not executable or too old."""

    code = "helper-unusable"


class SocketPathError(InputError):
    """A socket's path would be longer than the kernel allows (103 bytes on macOS, 107 on Linux)."""

    code = "socket-path-too-long"


class UnsupportedError(InputError):
    """This host or this hypervisor cannot do what was asked."""

    code = "unsupported"


class StateError(OVMError):
    """The call does not fit the machine's present state; the message says what would."""

    code = "wrong-state"


class InUseError(OVMError):
    """Another process owns the directory; the message says which."""

    code = "in-use"


class SpaceError(OVMError):
    """The file system has too little room; the message says how much is needed."""

    code = "no-space"


class PortError(OVMError):
    """A host port could not be bound, or is not one that was exported."""

    code = "port"


class StartError(OVMError):
    """The start failed. ``stage``, ``exit_reason`` and ``log_tail`` say where and why; nothing is left running."""

    code = "start-failed"


class HelperExited(StartError):
    """A helper process ended although nobody had asked it to."""

    code = "helper-exited"


class NotReadyError(StartError):
    """The guest was not ready within its deadline."""

    code = "guest-not-ready"


class GuestRefused(StartError):
    """The guest itself reported that it cannot go on, a damaged data disk for one."""

    code = "guest-refused"


class GuestError(OVMError):
    """The running guest could not be reached, or did not do as asked."""

    code = "guest-error"


class HostKeyMismatch(GuestError):
    """sshd answered with a host key other than the one this manager gave its guest."""

    code = "host-key-mismatch"


class ExecTimeout(GuestError):
    """A command in the guest ran past its deadline."""

    code = "exec-timeout"


class StopError(OVMError):
    """The machine could not be stopped; the message says what is still running."""

    code = "stop-failed"


class SkewError(OVMError):
    """The service that holds the machine is of another version of ovm, and not understood."""

    code = "version-skew"


class ImageError(OVMError):
    """A guest image is damaged, unknown, or could not be built or fetched."""

    code = "image"


def from_dict(told: Mapping[str, Any]) -> OVMError:
    """The error that :meth:`OVMError.as_dict` told of, in this or another process; of an unknown code, a plain one."""
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
    """The first real error of a task group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
