"""The machines there are on this host: what their files and locks tell, without asking anybody.

Quick on purpose: a list of machines is made of this, and a shell's completion too.
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
"""Beside the machines; held by whoever changes the settings of one."""
SETTINGS_WAIT_S = 35.0
"""How long another process may hold it: systemctl, which a change may run, has 30 s."""
SERVICE_LOCK = "service.lock"
SERVICE_RECORD = "service.json"
ENDED = "ended.json"
DEFAULT_MACHINE = "default"
DEFAULT_CPUS = max(1, (os.cpu_count() or 2) // 2)
DEFAULT_MEMORY_MIB = defaults.MEMORY_MIB
DEFAULT_DISK_MIB = defaults.DATA_DISK_MIB
MACHINE_NAME_MAX = 32
"""Long enough for people, short enough for the path of a socket."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine by its name: where its parts are."""

    name: str
    directory: Path

    @property
    def settings_path(self) -> Path:
        """What people write down about it."""
        return self.directory / SETTINGS

    @property
    def target(self) -> Path:
        """What it is made of."""
        return self.directory / "target"

    @property
    def log_dir(self) -> Path:
        """Its logs."""
        return self.directory / "log"

    @property
    def keys(self) -> paths.KeyPaths:
        """Its ssh keys."""
        return paths.KeyPaths(self.directory / "ssh")

    @property
    def socket_dir(self) -> Path:
        """Where its service has its sockets, or else where they would be made now; nobody has looked at it yet."""
        record = read(self.service_record, ServiceRecord)
        if record is not None and is_held(self.service_lock):
            return Path(record.socket_dir)
        return paths.default_socket_dir(self.name)

    @property
    def sockets(self) -> paths.SocketPaths:
        """Its sockets, in a directory that no other user can have made or can change.

        Raises:
            UntrustedError: one can.
            FileError: it cannot be looked at.
        """
        directory = self.socket_dir  # once: a service that begins or ends in between changes it
        directories.check(directory)
        return paths.SocketPaths(directory)

    @property
    def service_socket(self) -> Path:
        """Where its service answers."""
        return self.sockets.service

    @property
    def service_lock(self) -> Path:
        """Held by its service."""
        return self.directory / SERVICE_LOCK

    @property
    def service_record(self) -> Path:
        """Who its service is."""
        return self.directory / SERVICE_RECORD

    @property
    def ended_record(self) -> Path:
        """How its last run ended."""
        return self.directory / ENDED

    @property
    def data_disk(self) -> Path:
        """What is worth keeping of it."""
        return paths.TargetPaths(self.target).data_disk

    def settings(self) -> Settings:
        """What is written down about it; the defaults if nothing is.

        Raises:
            SettingsError: that cannot be understood.
            FileError: it cannot be read.
        """
        return parse(self.settings_text(), self.settings_path)

    def settings_text(self) -> str:
        """The same as it stands there; empty if nothing does.

        Raises:
            FileError: it cannot be read, is no regular file, or is longer than SETTINGS_MAX_BYTES.
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
        """What ``text`` would mean for it.

        Raises:
            SettingsError: it cannot be understood.
            OptionError: its data disk would have to become smaller.
        """
        wanted, there = parse(text, self.settings_path), _stat(self.data_disk)
        if wanted.disk is not None and there is not None and wanted.disk << 20 < there.st_size:
            raise OptionError(
                f"the data disk of {self.name} has {there.st_size >> 20}M, and only ever grows",
                hint="give a larger size",
            )
        return wanted

    def change_settings(self, change: Callable[[str], str], *, make: bool = False) -> None:
        """Replace the text of the settings by what ``change`` makes of it, whole or not at all.

        No other process changes settings meanwhile. Only the user can read the file: it may have a proxy's password.
        If it is a link, the file that the link leads to is replaced.

        Args:
            change: Given the present text, returns the new one. What it raises leaves everything as it was.
            make: Make the machine's directory if there is none.

        Raises as :meth:`check_settings` and :func:`ovm.registry.host_checks.check_changes` do, and:

        Raises:
            InUseError: another process has been changing settings for SETTINGS_WAIT_S.
            StateError: there is no such machine, and ``make`` is false.
            FileError: the file cannot be read or written.
            UntrustedError: it is a link to where another user could exchange the file.
            SpaceError: the file system is full.
        """
        from ovm.registry.host_checks import check_changes  # those that only read need not import it

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
        except SettingsError:  # the change is there to mend it
            return Settings()

    def write_settings(self, text: str) -> None:
        """Replace the settings by ``text``, and make the machine's directory if there is none.

        Raises as :meth:`change_settings` does.
        """
        self.change_settings(lambda _before: text, make=True)


@contextlib.contextmanager
def settings_held() -> Iterator[None]:
    """Nobody else changes the settings of a machine, or removes one, while inside.

    Raises:
        InUseError: another process has been doing so for SETTINGS_WAIT_S.
        FileError: the directory of the machines cannot be made or written to.
    """
    directory = paths.machines_dir()
    directories.make(directory)
    with held(directory / SETTINGS_LOCK, wait_s=SETTINGS_WAIT_S):
        yield


def check_name(name: str) -> str:
    """``name`` if a machine can be called so.

    Raises:
        OptionError: it could not be a directory's name, or is too long.
    """
    if not _is_name(name):
        raise OptionError(
            f"a machine cannot be called {name!r}",
            hint=f"letters, digits, '-', '_' and '.', the first a letter or digit, {MACHINE_NAME_MAX} at most",
        )
    return name


def _is_name(text: str) -> bool:
    return len(text) <= MACHINE_NAME_MAX and _NAME.fullmatch(text) is not None


def names() -> list[str]:
    """The names of all machines, in order.

    Raises:
        UntrustedError: another user could have made them, or could change them.
        FileError: they cannot be looked at.
    """
    home = paths.machines_dir()
    if not directories.check(home):
        if os.path.lexists(home):
            raise FileError(f"{home} is no directory", hint=f"move {home} away")
        return []
    try:
        with os.scandir(home) as entries:
            return sorted(entry.name for entry in entries if _is_name(entry.name) and _is_directory(entry))
    except OSError as error:
        raise FileError(f"{home} cannot be listed: {error.strerror}", hint=advice(error, home / "x")) from error


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or leads to one; a link that leads to itself raises."""
    with contextlib.suppress(OSError):
        return entry.is_dir()
    return False


def of(name: str) -> Machine:
    """The machine called ``name``, whether there is one or not.

    Raises:
        OptionError: no machine can be called so.
        UntrustedError: another user made its directory, or could change it.
        FileError: its directory cannot be looked at.
    """
    machine = Machine(check_name(name), paths.machine_dir(name))
    directories.check(machine.directory)
    return machine


def find(name: str) -> Machine:
    """The machine called ``name``.

    Raises:
        OptionError: no machine can be called so.
        UntrustedError: another user made its directory, or could change it.
        FileError: its directory cannot be looked at.
        StateError: there is none.
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
        hint=f"there {'is' if len(there) == 1 else 'are'} {', '.join(there)}"
        if there
        else f"make it: ovm start {machine.name}",
    )


@dataclass(frozen=True, slots=True)
class Rest:
    """What can be told of a machine without asking anybody."""

    held_by: Literal["nobody", "service", "program"]
    """``program``: one that has made the machine for itself, by ``create_ovm``."""
    pid: int | None
    """The process that holds it, if that is known."""
    state: Literal["stopped", "suspended", "crashed", "alive"]
    """``suspended``: stopped, with a saved state that its next start resumes."""
    why: str
    """Why it has crashed; else empty."""
    last: Ended | None
    """How its last run ended; ``None`` if it never ran, or if that could not be recorded."""
    unrecorded: bool
    """Whether it ran, and how that ended could not be recorded."""
    last_up: float | None
    """When it last ran, in seconds since the epoch; ``None`` if it never did."""
    disk_bytes: int | None
    """What its data disk takes up on this host; ``None`` if it has none yet."""
    disk_size_bytes: int | None
    """What the data disk can hold."""


def at_rest(machine: Machine) -> Rest:
    """What its files and locks tell."""
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
    """Who holds it, as which process, and why it has crashed."""
    if is_held(machine.service_lock):
        return "service", record.pid if record else None, ""
    crash = "" if record is None else _crash(machine, record)
    if not is_held(machine.target / paths.LOCK):
        return "nobody", None, crash
    from ovm.process.lock import owner  # in no hurry any more: it is nobody's only when it rests

    manager = owner(machine.target)
    if manager is None or identity.is_there(manager):
        return "program", manager.pid if manager else None, ""
    return "program", None, crash or f"the program that held it (process {manager.pid}) was killed"


def _crash(machine: Machine, record: ServiceRecord) -> str:
    """What became of a service that has not taken its record away."""
    if record.boot_id != identity.boot():
        return "the host went down while it ran"
    if not os.access(machine.directory, os.W_OK):
        return f"its service (process {record.pid}) left no record of its end: {machine.directory} cannot be written to"
    return f"its service (process {record.pid}) was killed"


def refuse_others(machine: Machine) -> None:
    """Refuse to touch it while another program than its service holds it.

    Raises:
        InUseError: one does.
    """
    rest = at_rest(machine)
    if rest.held_by == "program" and rest.state == "alive":
        who = f"process {rest.pid}" if rest.pid else "another program"
        raise InUseError(f"{machine.name} is in use by {who}, through the library", hint="stop it there")


def refuse_running(machine: Machine) -> None:
    """Refuse to touch it while anybody holds it.

    Raises:
        InUseError: somebody does.
    """
    refuse_others(machine)
    rest = at_rest(machine)
    if rest.held_by == "service":
        raise InUseError(f"{machine.name} is running", hint=f"stop it first: ovm stop {machine.name}")
    if rest.held_by == "program":
        raise InUseError(f"{machine.name}: {rest.why}, and what that has left is not gone yet", hint="try again")


def restart_needed(machine: Machine, started: Settings) -> list[str]:
    """The settings changed since the start; they take effect at the next one."""
    try:
        now = machine.settings()
    except (FileError, ValueError):  # somebody is editing it
        return []
    return [key for key in sorted(RESTART_KEYS) if getattr(now, key) != getattr(started, key)]


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return path.stat()
    return None
