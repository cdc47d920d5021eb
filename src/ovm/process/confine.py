"""What of the host's files a helper may use: a command line that gives up all else before the helper begins.

By Landlock on Linux (:mod:`ovm.process.landlock`), by ``sandbox-exec`` on macOS. Where the host has neither, the
helper runs as it is. What a helper was given open, its log for one, it keeps. The network is not confined.
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
"""Where libraries and their loader are."""
SETTINGS = (
    "/etc",
    *("/run/systemd", "/run/resolvconf", "/run/NetworkManager", "/run/connman", "/run/nscd"),
    *("/dev/null", "/dev/urandom"),
    *("/proc/self", "/proc/sys", "/sys/fs/cgroup", "/sys/kernel/mm"),
)
"""What a program without files of its own asks about the host: names, time, limits. Resolvers are replaced and linked
to elsewhere when the network changes, so it is directories that may be read; never all of /run, where users' are."""
RESOLVERS = Path("/etc/resolv.conf")


@dataclass(frozen=True, kw_only=True)
class Rights:
    """What a helper may do with files, besides reading the system's own and executing itself."""

    sockets: Sequence[Path] = ()
    """Directories in which it may make unix sockets, and remove any file."""
    reads: Sequence[Path] = ()
    """Files it may read, and directories with all that is below."""


def available() -> bool:
    """Whether this host can confine a helper."""
    return SANDBOX_EXEC.exists() if sys.platform == "darwin" else landlock.version() > 0


def command(argv: Sequence[str | os.PathLike[str]], rights: Rights) -> list[str]:
    """``argv`` with ``rights`` and no more; unchanged where this host cannot do that.

    The process that executes it becomes the program: with its pid, group and open files. If the program cannot be
    executed, or not be confined, it says why on standard error and ends with a status of landlock.CANNOT_EXECUTE or
    landlock.CANNOT_CONFINE; ``sandbox-exec`` has statuses of its own.

    Args:
        argv: The program, by its whole path, and its arguments.
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
    """Read once: a helper may have to be started again when another version has replaced the package."""
    return Path(landlock.__file__).read_text("utf-8")


def rules(program: str, rights: Rights) -> list[str]:
    """The words that tell :mod:`ovm.process.landlock` what to allow."""
    return [
        *(f"x{path}" for path in (program, *SYSTEM)),
        *(f"r{path}" for path in (*SETTINGS, *_resolvers(), *rights.reads)),
        *(f"s{path}" for path in rights.sockets),
    ]


def _resolvers() -> Iterator[Path]:
    """Where /etc/resolv.conf leads on a host of another make: the directory, or if much else may be there, the file."""
    file = RESOLVERS.resolve()
    crowded = len(file.parent.parts) < 3 or _home().is_relative_to(file.parent)  # /, /run, somebody's home
    yield file if crowded else file.parent


def _home() -> Path:
    """The user's home; a path that nothing has where the user has neither ``HOME`` nor an account."""
    return Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.expanduser raises then


def profile(rights: Rights) -> str:
    """What is told to ``sandbox-exec``; the last rule that fits decides. Paths come as parameters: nothing to quote."""
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
    """What the profile's names stand for, without links: /tmp is one on macOS."""
    named: Mapping[str, str | os.PathLike[str]] = {
        "HOME": _home(),
        "PROGRAM": program,
        **{f"READ{number}": path for number, path in enumerate(rights.reads)},
        **{f"SOCKETS{number}": path for number, path in enumerate(rights.sockets)},
    }
    for name, path in named.items():
        yield from ("-D", f"{name}={os.path.realpath(path)}")
