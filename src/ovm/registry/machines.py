"""The machines on this host, by their files and locks alone; no process is queried.

Fast on purpose: the list of machines and shell completion use it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovm import paths
from ovm.errors import FileError, InUseError, OptionError, SettingsError, StateError
from ovm.model import defaults
from ovm.process import identity
from ovm.registry.records import Ended, ServiceRecord, read
from ovm.registry.settings import RESTART_KEYS, SETTINGS_MAX_BYTES, Settings, parse
from ovm.trust import directories
from ovm.trust.atomic import disk_errors, write_through
from ovm.trust.files import advice, read_file
from ovm.trust.locks import held, is_held

SETTINGS = "machine.toml"
SETTINGS_LOCK = ".settings.lock"
"""Lock in the directory of the machines; held while the settings of a machine change."""
SETTINGS_WAIT_S = 35.0
"""How long to wait for that lock: a change may run systemctl, which has a timeout of 30 s."""
SERVICE_LOCK = "service.lock"
SERVICE_RECORD = "service.json"
ENDED = "ended.json"
DEFAULT_MACHINE = "default"
DEFAULT_CPUS = max(1, (os.cpu_count() or 2) // 2)
DEFAULT_MEMORY_MIB = defaults.MEMORY_MIB
DEFAULT_DISK_MIB = defaults.DATA_DISK_MIB
MACHINE_NAME_MAX = 32
"""Limited by the length of a socket's path."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine's name and paths."""

    name: str
    directory: Path

    @property
    def settings_path(self) -> Path:
        """The settings file."""
        return self.directory / SETTINGS

    @property
    def target(self) -> Path:
        """The directory of the machine's disks and other files."""
        return self.directory / "target"

    @property
    def log_dir(self) -> Path:
        """The directory of the logs."""
        return self.directory / "log"

    @property
    def keys(self) -> paths.KeyPaths:
        """The ssh keys."""
        return paths.KeyPaths(self.directory / "ssh")

    @property
    def socket_dir(self) -> Path:
        """The directory of the running service's sockets, or of those of the next start. It is not yet checked."""
        record = read(self.service_record, ServiceRecord)
        if record is not None and is_held(self.service_lock):
            return Path(record.socket_dir)
        return paths.default_socket_dir(self.name)

    @property
    def sockets(self) -> paths.SocketPaths:
        """The sockets, in a directory that no other user can have created or can change.

        Raises:
            UntrustedError: another user can.
            FileError: the directory cannot be checked.
        """
        directory = self.socket_dir  # read once: a service that starts or ends meanwhile changes it
        directories.check(directory)
        return paths.SocketPaths(directory)

    @property
    def service_socket(self) -> Path:
        """The service's socket."""
        return self.sockets.service

    @property
    def service_lock(self) -> Path:
        """The lock that the service holds."""
        return self.directory / SERVICE_LOCK

    @property
    def service_record(self) -> Path:
        """The record of the service's process."""
        return self.directory / SERVICE_RECORD

    @property
    def ended_record(self) -> Path:
        """The record of how the last run ended."""
        return self.directory / ENDED

    @property
    def data_disk(self) -> Path:
        """The data disk."""
        return paths.TargetPaths(self.target).data_disk

    def settings(self) -> Settings:
        """Read the settings; the defaults if there is no settings file.

        Raises:
            SettingsError: the settings are invalid.
            FileError: the file cannot be read.
        """
        return parse(self.settings_text(), self.settings_path)

    def settings_text(self) -> str:
        """Read the text of the settings file; empty if there is none.

        Raises:
            FileError: the file cannot be read, is not a regular file, or is longer than SETTINGS_MAX_BYTES.
        """
        try:
            return read_file(self.settings_path, SETTINGS_MAX_BYTES).decode()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise FileError(
                f"{self.settings_path} cannot be read: {error.strerror}", hint=advice(error, self.settings_path)
            ) from error
        except UnicodeDecodeError as error:
            raise FileError(
                f"{self.settings_path} cannot be read: it is not UTF-8", hint="save it as UTF-8 text"
            ) from error

    def check_settings(self, text: str) -> Settings:
        """Parse ``text`` as new settings of the machine.

        Raises:
            SettingsError: the text is invalid.
            OptionError: the data disk would have to shrink.
        """
        wanted, there = parse(text, self.settings_path), _stat(self.data_disk)
        if wanted.disk is not None and there is not None and wanted.disk << 20 < there.st_size:
            raise OptionError(
                f"the data disk of {self.name} has {there.st_size >> 20}M and cannot shrink",
                hint="choose a larger size",
            )
        return wanted

    def change_settings(self, change: Callable[[str], str], *, make: bool = False) -> None:
        """Replace the text of the settings with the result of ``change``, atomically.

        No other process changes settings meanwhile. Only the user can read the file, because it may contain a proxy's
        password. If the file is a link, its target is replaced.

        Args:
            change: Called with the current text; returns the new one. If it raises, nothing changes.
            make: Create the machine's directory if it is missing.

        Raises as :meth:`check_settings` and :func:`ovm.registry.host_checks.check_changes` do, and:

        Raises:
            InUseError: another process has been changing settings for SETTINGS_WAIT_S.
            StateError: the machine does not exist, and ``make`` is false.
            FileError: the file cannot be read or written.
            UntrustedError: the file is a link to a directory where another user could replace the target.
            SpaceError: the file system is full.
        """
        from ovm.registry.host_checks import check_changes  # imported here, because readers do not need it

        with settings_held():
            if not make:
                _check_there(self)
            before = self.settings_text()
            after = change(before)
            wanted = self.check_settings(after)
            check_changes(self._present(before), wanted)
            if after == before and self.settings_path.exists():
                return
            directories.make(self.directory)
            with disk_errors(f"{self.settings_path} cannot be written"):
                write_through(self.settings_path, after.encode(), 0o600)

    def _present(self, text: str) -> Settings:
        try:
            return parse(text, self.settings_path)
        except SettingsError:  # the change is meant to repair it
            return Settings()

    def write_settings(self, text: str) -> None:
        """Replace the settings with ``text``, and create the machine's directory if it is missing.

        Raises as :meth:`change_settings` does.
        """
        self.change_settings(lambda _before: text, make=True)


@contextlib.contextmanager
def settings_held() -> Iterator[None]:
    """Keep other processes from changing a machine's settings or removing a machine while inside.

    Raises:
        InUseError: another process has been doing so for SETTINGS_WAIT_S.
        FileError: the directory of the machines cannot be created or written to.
    """
    directory = paths.machines_dir()
    directories.make(directory)
    with held(directory / SETTINGS_LOCK, wait_s=SETTINGS_WAIT_S):
        yield


def check_name(name: str) -> str:
    """Return ``name`` if it is valid for a machine.

    Raises:
        OptionError: it has other characters than allowed, or is too long.
    """
    if not _is_name(name):
        raise OptionError(
            f"{name!r} is not a valid machine name",
            hint=f"use at most {MACHINE_NAME_MAX} letters, digits, '-', '_' and '.', beginning with a letter or digit",
        )
    return name


def _is_name(text: str) -> bool:
    return len(text) <= MACHINE_NAME_MAX and _NAME.fullmatch(text) is not None


def names() -> list[str]:
    """Return the names of all machines, sorted.

    Raises:
        UntrustedError: another user could have created them, or could change them.
        FileError: their directory cannot be listed.
    """
    home = paths.machines_dir()
    if not directories.check(home):
        if os.path.lexists(home):
            raise FileError(f"{home} is not a directory", hint=f"move {home} away")
        return []
    try:
        with os.scandir(home) as entries:
            return sorted(entry.name for entry in entries if _is_name(entry.name) and _is_directory(entry))
    except OSError as error:
        raise FileError(f"{home} cannot be listed: {error.strerror}", hint=advice(error, home / "x")) from error


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether it is a directory or a link to one. ``is_dir`` raises for a link to itself."""
    with contextlib.suppress(OSError):
        return entry.is_dir()
    return False


def of(name: str) -> Machine:
    """Return the machine ``name``, which need not exist.

    Raises:
        OptionError: the name is invalid.
        UntrustedError: another user created its directory, or could change it.
        FileError: its directory cannot be checked.
    """
    machine = Machine(check_name(name), paths.machine_dir(name))
    directories.check(machine.directory)
    return machine


def find(name: str) -> Machine:
    """Return the machine ``name``.

    Raises:
        OptionError: the name is invalid.
        UntrustedError: another user created its directory, or could change it.
        FileError: its directory cannot be checked.
        StateError: it does not exist.
    """
    machine = of(name)
    _check_there(machine)
    return machine


def _check_there(machine: Machine) -> None:
    if machine.directory.is_dir():
        return
    there = names()
    raise StateError(
        f"there is no machine called {machine.name}",
        hint=f"choose one of: {', '.join(there)}" if there else f"create it: ovm start {machine.name}",
    )


@dataclass(frozen=True, slots=True)
class Rest:
    """The state of a machine, by its files and locks alone."""

    held_by: Literal["nobody", "service", "program"]
    """``program``: a program that uses the library, by ``create_ovm``."""
    pid: int | None
    """The process that holds the machine, if known."""
    state: Literal["stopped", "suspended", "crashed", "alive"]
    """``suspended``: stopped, with a saved state that the next start resumes."""
    why: str
    """Reason of a crash; else empty."""
    last: Ended | None
    """How the last run ended; ``None`` if there was none, or its end could not be recorded."""
    unrecorded: bool
    """Whether the end of the last run could not be recorded."""
    last_up: float | None
    """Time of the last run, in seconds since the epoch; ``None`` if there was none."""
    disk_bytes: int | None
    """Space that the data disk uses on this host; ``None`` if there is no data disk yet."""
    disk_size_bytes: int | None
    """Size of the data disk."""


def at_rest(machine: Machine) -> Rest:
    """Return the state of the machine by its files and locks."""
    record = read(machine.service_record, ServiceRecord)
    held_by, pid, why = _holder(machine, record)
    alive = held_by != "nobody" and not why
    disk = _stat(machine.data_disk)
    last = read(machine.ended_record, Ended)
    return Rest(
        held_by=held_by,
        pid=pid,
        state="alive" if alive else _resting(machine, why),
        why=why,
        last=last,
        unrecorded=last is None and os.path.lexists(machine.ended_record),
        last_up=time.time() if alive else disk.st_mtime if disk else None,
        disk_bytes=disk.st_blocks * 512 if disk else None,
        disk_size_bytes=disk.st_size if disk else None,
    )


def _resting(machine: Machine, why: str) -> Literal["stopped", "suspended", "crashed"]:
    if why:
        return "crashed"
    return "suspended" if os.path.lexists(paths.TargetPaths(machine.target).suspended) else "stopped"


def _holder(
    machine: Machine, record: ServiceRecord | None
) -> tuple[Literal["nobody", "service", "program"], int | None, str]:
    """Return what holds the machine, its process id, and the reason of a crash."""
    if is_held(machine.service_lock):
        return "service", record.pid if record else None, ""
    crash = "" if record is None else _crash(machine, record)
    if not is_held(machine.target / paths.LOCK):
        return "nobody", None, crash
    from ovm.process.lock import owner  # slow to import, and only needed for a machine in use

    manager = owner(machine.target)
    if manager is None or identity.is_there(manager):
        return "program", manager.pid if manager else None, ""
    return "program", None, crash or f"the program that held it (process {manager.pid}) was killed"


def _crash(machine: Machine, record: ServiceRecord) -> str:
    """Return what happened to a service that has not deleted its record."""
    if record.boot_id != identity.boot():
        return "the host went down while it ran"
    if not os.access(machine.directory, os.W_OK):
        return f"its service (process {record.pid}) left no record of its end: {machine.directory} cannot be written to"
    return f"its service (process {record.pid}) was killed"


def refuse_others(machine: Machine) -> None:
    """Raise if a program other than the service holds the machine.

    Raises:
        InUseError: one does.
    """
    rest = at_rest(machine)
    if rest.held_by == "program" and rest.state == "alive":
        who = f"process {rest.pid}" if rest.pid else "another program"
        raise InUseError(f"{machine.name} is in use by {who}, through the library", hint="stop it there")


def refuse_running(machine: Machine) -> None:
    """Raise if any process holds the machine.

    Raises:
        InUseError: one does.
    """
    refuse_others(machine)
    rest = at_rest(machine)
    if rest.held_by == "service":
        raise InUseError(f"{machine.name} is running", hint=f"stop it first: ovm stop {machine.name}")
    if rest.held_by == "program":
        raise InUseError(f"{machine.name}: {rest.why}, and its helper processes have not ended yet", hint="try again")


def restart_needed(machine: Machine, started: Settings) -> list[str]:
    """Return the settings that differ from those of the start and take effect at the next start."""
    try:
        now = machine.settings()
    except (FileError, ValueError):  # it may be half edited
        return []
    return [key for key in sorted(RESTART_KEYS) if getattr(now, key) != getattr(started, key)]


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return path.stat()
    return None
