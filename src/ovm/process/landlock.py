"""A wrapper that gives up all rights to files but those it is told of, for ever, and becomes another program.

``python -I -S -c SOURCE RULE… -- PROGRAM ARGUMENT…``: it has the standard library alone, so that its source is all
that a running machine has to keep of it. In a frozen app, which has no Python to run it with, it is the app itself,
started with a reserved argument.

By Landlock, which Linux has since 5.13: a process may give up rights of its own, without privileges. Pid, process
group, open files, umask and working directory stay what they were. Rights that the kernel does not know yet are not
given up; every kernel with Landlock knows those to make and remove files.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys

TYPE_CHECKING = False  # typing and signal would take longer to import than all else takes to do
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

END_OF_RULES = "--"
CANNOT_CONFINE = 126
CANNOT_EXECUTE = 127

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_TELL_VERSION = 1
_BENEATH_A_PATH = 1
_NO_NEW_PRIVILEGES = 38
_IGNORED_BY_PYTHON = (13, 25)
"""SIGPIPE and SIGXFSZ; whatever ignores a signal bequeaths that to what it executes."""

_EXECUTE, _READ_FILE, _READ_DIRECTORY, _REMOVE_FILE, _MAKE_SOCKET = 1 << 0, 1 << 2, 1 << 3, 1 << 5, 1 << 9
_OF_FILES = _EXECUTE | _READ_FILE
_KNOWN_SINCE = {1: 13, 2: 14, 3: 15, 5: 16}
"""How many rights to files there are, by the version that brought the last of them: to link and rename elsewhere, to
truncate, to command devices."""
_SCOPES_SINCE = 6
_SCOPES = 0b11
"""Neither unix sockets without a path nor signals to whoever is not confined as it is."""

RIGHTS = {
    "r": _READ_FILE | _READ_DIRECTORY,
    "x": _READ_FILE | _READ_DIRECTORY | _EXECUTE,
    "s": _MAKE_SOCKET | _REMOVE_FILE,
}
"""What a rule's first letter stands for; its path follows. A path that cannot be opened gets no rule."""

_ADDED_BY_LOADERS = ("_PYI_", "LD_LIBRARY_PATH", "LC_CTYPE")
"""What a frozen app's loader, and Python, add to an environment."""


def version() -> int:
    """Which Landlock the kernel has; 0 for none, or none that may be used."""
    try:
        return _call(_CREATE_RULESET, None, 0, _TELL_VERSION)
    except OSError:
        return 0


def become(rules: Sequence[str], argv: Sequence[str]) -> NoReturn:
    """Confine this process by ``rules``, then execute ``argv``. What fails is told on standard error."""
    try:
        confine(rules)
    except OSError as error:
        _end(CANNOT_CONFINE, f"{argv[0]} cannot be confined: {error.strerror}")
    for number in _IGNORED_BY_PYTHON:
        _libc().signal(number, None)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_ADDED_BY_LOADERS)}
    try:
        os.execve(argv[0], list(argv), environment)  # noqa: S606 - that is what it is for
    except OSError as error:
        _end(CANNOT_EXECUTE, f"{argv[0]} cannot be executed: {error.strerror}")


def confine(rules: Sequence[str]) -> None:
    """Give up all rights to files but those of ``rules``, and that to gain others by executing something.

    Raises:
        OSError: the kernel refuses.
    """
    known = version()
    handled = (1 << max(count for since, count in _KNOWN_SINCE.items() if since <= max(known, 1))) - 1
    ruleset = _call(_CREATE_RULESET, struct.pack("=QQQ", handled, 0, _SCOPES if known >= _SCOPES_SINCE else 0), 24, 0)
    for rule in rules:
        try:
            path = os.open(rule[1:], os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights = RIGHTS[rule[0]] if stat.S_ISDIR(os.fstat(path).st_mode) else RIGHTS[rule[0]] & _OF_FILES
        if rights:
            _call(_ADD_RULE, ruleset, _BENEATH_A_PATH, struct.pack("=Qi", rights, path), 0)
        os.close(path)
    _checked(_libc().prctl(_NO_NEW_PRIVILEGES, *map(ctypes.c_ulong, (1, 0, 0, 0))))
    _call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _call(number: int, *arguments: int | bytes | None) -> int:
    words = (ctypes.c_long(word) if isinstance(word, int) else word for word in (number, *arguments))
    return _checked(_libc().syscall(*words))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _end(status: int, message: str) -> NoReturn:
    os.write(2, os.fsencode(f"ovm: {message}\n"))
    os._exit(status)


def main(words: Sequence[str]) -> NoReturn:
    """``RULE… -- PROGRAM ARGUMENT…``."""
    end = words.index(END_OF_RULES)
    become(words[:end], words[end + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
