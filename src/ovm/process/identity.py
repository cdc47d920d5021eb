"""Identity of a process: its pid, its start time and its program.

A pid alone may be reused. Pid and start time together identify one process until the host reboots. Linux has both in
/proc, macOS in libproc.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

PID_MAX = 2**31 - 1
"""Maximum of the kernel's type."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One process; no later process equals it."""

    pid: int
    started: int
    """Start time in the kernel's unit: ticks since the boot on Linux, microseconds since 1970 on macOS."""
    program: str
    """The path of its executable; empty if the kernel does not report it."""

    def __post_init__(self) -> None:
        if not 0 < self.pid <= PID_MAX:  # 0 and below are groups of processes, or all of them
            raise ValueError(f"{self.pid} is not a process id")


def is_there(process: Identity) -> bool:
    """Return whether it runs, whatever its program is by now; a zombie does not."""
    now = of(process.pid)
    return now is not None and now.started == process.started


if sys.platform == "darwin":
    import ctypes

    _PROC_PIDTBSDINFO = 3
    _PATH_BYTES = 4096

    class _BSDInfo(ctypes.Structure):
        """proc_bsdinfo, from sys/proc_info.h."""

        _fields_ = [
            ("flags_status_xstatus_pid_ppid", ctypes.c_uint32 * 5),
            ("uid", ctypes.c_uint32),
            ("other_ids", ctypes.c_uint32 * 6),
            ("names", ctypes.c_char * 48),
            ("files_groups_terminal", ctypes.c_uint32 * 5),
            ("nice", ctypes.c_int32),
            ("started_s", ctypes.c_uint64),
            ("started_us", ctypes.c_uint64),
        ]

    def of(pid: int) -> Identity | None:
        """Return the process that has this pid now; ``None`` if there is none or it has ended."""
        if (info := _info(pid)) is None:  # of a zombie, too
            return None
        buffer = ctypes.create_string_buffer(_PATH_BYTES)
        length = max(0, _system().proc_pidpath(pid, buffer, _PATH_BYTES))
        started = info.started_s * 1_000_000 + info.started_us
        return Identity(pid=pid, started=started, program=buffer.raw[:length].decode(errors="replace"))

    def owner(pid: int) -> int | None:
        """Return the user that the process runs as."""
        info = _info(pid)
        return None if info is None else info.uid

    def boot() -> str:
        """Return the id of the host's current boot."""
        size = ctypes.c_size_t(128)
        buffer = ctypes.create_string_buffer(size.value)
        _system().sysctlbyname(b"kern.bootsessionuuid", buffer, ctypes.byref(size), None, ctypes.c_size_t(0))
        return buffer.value.decode(errors="replace")

    def _info(pid: int) -> _BSDInfo | None:
        info = _BSDInfo()
        size = ctypes.sizeof(info)
        told = _system().proc_pidinfo(pid, _PROC_PIDTBSDINFO, ctypes.c_uint64(0), ctypes.byref(info), size)
        return info if told == size else None

    def _system() -> ctypes.CDLL:
        return ctypes.CDLL(None)

else:
    _BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
    _OUR_PIDS = Path("/proc/self/ns/pid")
    _STATE, _THREADS, _STARTED = 0, 17, 19
    """Fields of proc_pid_stat(5), counted from the one after the name."""

    def of(pid: int) -> Identity | None:
        """Return the process that has this pid now; ``None`` if there is none or it has ended."""
        try:
            told = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        fields = told.rpartition(b")")[2].split()  # its name may contain anything, also ") "
        # a zombie whose other threads run has not ended
        if fields[_STATE] in b"ZXx" and int(fields[_THREADS]) <= 1:
            return None
        try:
            program = os.fsencode(Path(f"/proc/{pid}/exe").readlink()).decode(errors="replace")
        except OSError:
            program = ""
        return Identity(pid=pid, started=int(fields[_STARTED]), program=program.removesuffix(" (deleted)"))

    def owner(pid: int) -> int | None:
        """Return the user that the process runs as."""
        try:
            told = Path(f"/proc/{pid}/status").read_bytes()
        except OSError:
            return None
        # not the file's owner, which is root if the process has changed its privileges
        return int(told.partition(b"\nUid:")[2].split()[1])

    def boot() -> str:
        """Return the id of the host's current boot and of the pid namespace: a container has its own pids."""
        try:
            return f"{_BOOT_ID.read_text().strip()} {_OUR_PIDS.readlink()}"
        except OSError:
            return ""
