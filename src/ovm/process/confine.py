"""Confinement: a command line that limits a helper's access to the host's files before it starts the helper.

Linux uses Landlock (:mod:`ovm.process.landlock`), macOS ``sandbox-exec``. On a host with neither, the helper is not
confined. A helper keeps the open files that it inherits, such as its log. The network is not confined.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ovm.process import guard, landlock

SANDBOX_EXEC = Path("/usr/bin/sandbox-exec")

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store", "/home/linuxbrew/.linuxbrew")
"""Directories of the libraries and their loader."""
SETTINGS = (
    "/etc",
    *("/run/systemd", "/run/resolvconf", "/run/NetworkManager", "/run/connman", "/run/nscd"),
    *("/dev/null", "/dev/urandom"),
    *("/proc/self", "/proc/sys", "/sys/fs/cgroup", "/sys/kernel/mm"),
)
"""What a program reads about the host: names, time, limits. A change of network replaces files and links of resolvers,
so directories may be read; never all of /run, which has users' directories."""
RESOLVERS = Path("/etc/resolv.conf")


@dataclass(frozen=True, kw_only=True)
class Rights:
    """What a helper may do with files, besides reading the system's files and executing itself."""

    sockets: Sequence[Path] = ()
    """Directories in which it may create unix sockets and remove any file."""
    reads: Sequence[Path] = ()
    """Files and directory trees that it may read."""


def available() -> bool:
    """Return whether this host can confine a helper."""
    return SANDBOX_EXEC.exists() if sys.platform == "darwin" else landlock.version() > 0


def command(argv: Sequence[str | os.PathLike[str]], rights: Rights) -> list[str]:
    """Return a command that runs ``argv`` with only ``rights``; ``argv`` itself if this host cannot confine.

    The wrapper becomes the program by exec: pid, group and open files stay. If the program cannot be executed or
    confined, the wrapper prints why on standard error and exits with landlock.CANNOT_EXECUTE or
    landlock.CANNOT_CONFINE; ``sandbox-exec`` has its own statuses.

    Args:
        argv: The program, by its absolute path, and its arguments.
        rights: What it may do.
    """
    words = [os.fspath(word) for word in argv]
    if not available():
        return words
    if sys.platform == "darwin":
        return [os.fspath(SANDBOX_EXEC), *_parameters(words[0], rights), "-p", profile(rights), *words]
    return [*_wrapper(), *rules(words[0], rights), landlock.END_OF_RULES, *words]


def _wrapper() -> list[str]:
    if app := guard.frozen_app():
        return [app, guard.CONFINE_ARGUMENT]
    return [sys.executable, "-I", "-S", "-c", _wrapper_source()]


@functools.cache
def _wrapper_source() -> str:
    """Read the wrapper's source once: a helper may be restarted after another version has replaced the package."""
    return Path(landlock.__file__).read_text("utf-8")


def rules(program: str, rights: Rights) -> list[str]:
    """Return the rules for :mod:`ovm.process.landlock`."""
    return [
        *(f"x{path}" for path in (program, *SYSTEM)),
        *(f"r{path}" for path in (*SETTINGS, *_resolvers(), *rights.reads)),
        *(f"s{path}" for path in rights.sockets),
    ]


def _resolvers() -> Iterator[Path]:
    """Yield the directory that /etc/resolv.conf links to, or the file alone if the directory may have much else."""
    file = RESOLVERS.resolve()
    crowded = len(file.parent.parts) < 3 or _home().is_relative_to(file.parent)  # /, /run, the user's home
    yield file if crowded else file.parent


def _home() -> Path:
    """Return the user's home; a path that does not exist if the user has neither ``HOME`` nor an account."""
    return Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.expanduser raises then


def profile(rights: Rights) -> str:
    """Return the profile for ``sandbox-exec``; the last matching rule decides. Paths are parameters: no quoting."""
    reads = ['(literal (param "PROGRAM"))', *_below("READ", rights.reads)]
    writes = ['(literal "/dev/null")', '(literal "/dev/dtracehelper")', *_below("SOCKETS", rights.sockets)]
    return "\n".join(
        (
            "(version 1)",
            "(allow default)",
            "(deny file-write*)",
            f"(allow file-write* {' '.join(writes)})",
            '(deny file-read-data (subpath (param "HOME")))',
            f"(allow file-read-data {' '.join(reads)})",
            "(deny process-exec*)",
            '(allow process-exec* (literal (param "PROGRAM")))',
        )
    )


def _below(name: str, paths: Sequence[Path]) -> Iterator[str]:
    return (f'(subpath (param "{name}{number}"))' for number in range(len(paths)))


def _parameters(program: str, rights: Rights) -> Iterator[str]:
    """Yield the profile's parameters with links resolved: /tmp is one on macOS."""
    named: Mapping[str, str | os.PathLike[str]] = {
        "HOME": _home(),
        "PROGRAM": program,
        **{f"READ{number}": path for number, path in enumerate(rights.reads)},
        **{f"SOCKETS{number}": path for number, path in enumerate(rights.sockets)},
    }
    for name, path in named.items():
        yield from ("-D", f"{name}={os.path.realpath(path)}")
