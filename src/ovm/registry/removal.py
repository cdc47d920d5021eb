"""Remove a machine, or its saved state, while no process can start it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ovm import paths
from ovm.errors import FileError, InUseError, UntrustedError
from ovm.registry.machines import Machine, refuse_running, settings_held
from ovm.trust import directories
from ovm.trust.locks import owned


def remove(machine: Machine) -> None:
    """Remove the machine with all its data. Its name becomes free at once, even if this process is then killed.

    Raises:
        InUseError: a process holds the machine.
        FileError: a file cannot be removed.
    """
    import shutil

    refuse_running(machine)
    if machine.directory.is_symlink():
        raise FileError(f"{machine.directory} is a symbolic link", hint="remove its target, then the link")
    doomed = machine.directory.with_name(f".ovm-removed.{machine.name}")
    socket_dir = machine.socket_dir
    try:
        with _nobody_else(machine):
            if doomed.exists():  # left by a killed removal
                shutil.rmtree(doomed)
            machine.directory.rename(doomed)
            _remove_sockets(socket_dir)
            shutil.rmtree(doomed)
    except OSError as error:
        raise FileError(
            f"{error.filename or machine.directory} cannot be removed: {error.strerror or error}"
        ) from error


def _remove_sockets(directory: Path) -> None:
    """Remove a directory of ours. One that another user has put in its place stays."""
    import shutil

    with contextlib.suppress(OSError, UntrustedError):
        directories.check(directory)
        with directories.opened(directory.parent) as above:
            shutil.rmtree(directory.name, dir_fd=above)


def forget_memory(machine: Machine) -> None:
    """Discard the saved state, so that the next start boots.

    Raises:
        InUseError: a process holds the machine.
        FileError: the saved state cannot be removed.
    """
    from ovm.disks import saved_state

    refuse_running(machine)
    with _nobody_else(machine):
        saved_state.discard(paths.TargetPaths(machine.target))


@contextlib.contextmanager
def _nobody_else(machine: Machine) -> Iterator[None]:
    """Keep other processes from starting the machine or changing its settings while inside."""
    with settings_held(), contextlib.ExitStack() as locks:
        for path in (machine.service_lock, machine.target / paths.LOCK):
            if path.parent.is_dir():
                fd = owned(path, replace=path.name == paths.LOCK)
                if fd is None:
                    raise InUseError(f"{machine.name} is being started", hint=f"stop it first: ovm stop {machine.name}")
                locks.callback(os.close, fd)
        yield
