"""A wrapper that permanently gives up all rights to files except those of its rules, then executes a program.

``python -I -S -c SOURCE RULE… -- PROGRAM ARGUMENT…``: it only uses the standard library, so a running machine has to
keep nothing but its source. A frozen app has no Python to run it: there the wrapper is the app itself, started with a
reserved argument.

It uses Landlock (since Linux 5.13), by which a process gives up rights without privileges. Pid, process group, open
files, umask and working directory stay. Rights that the kernel does not support are not given up; every kernel with
Landlock supports those to create and remove files.

Landlock does not restrict modes, owners, times, attributes and, before its version 6, access to other processes. So a
seccomp filter refuses the system calls that change those, and some that a network program never makes. It is a deny
list: an allow list would break with the next version of Go. There is no filter if the kernel has no seccomp, or if
the architecture has no list here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys

TYPE_CHECKING = False  # importing typing and signal would take longer than the rest of the work
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
"""SIGPIPE and SIGXFSZ; an ignored signal stays ignored across exec."""

_EXECUTE, _READ_FILE, _READ_DIRECTORY, _REMOVE_FILE, _MAKE_SOCKET = 1 << 0, 1 << 2, 1 << 3, 1 << 5, 1 << 9
_OF_FILES = _EXECUTE | _READ_FILE
_KNOWN_SINCE = {1: 13, 2: 14, 3: 15, 5: 16}
"""Number of rights to files, by the version that added the last of them: link and rename to another directory,
truncate, ioctl on devices."""
_SCOPES_SINCE = 6
_SCOPES = 0b11
"""No abstract unix sockets and no signals to processes outside the same confinement."""

_SET_SECCOMP, _FILTER = 22, 2
_LOAD, _EQUALS, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of BPF
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little endian
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_X32 = 0x40000000
"""Bit in the number of an x32 system call, which would otherwise bypass the list."""
_NEW_NAMESPACES = 0x7E020000

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's AUDIT_ARCH_ constants."""
REFUSED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "chmod fchmod fchmodat fchmodat2": ((90, 91, 268, 452), (52, 53, 452)),
    "chown fchown lchown fchownat": ((92, 93, 94, 260), (55, 54)),
    "utime utimes futimesat utimensat": ((132, 235, 261, 280), (88,)),
    "setxattr lsetxattr fsetxattr setxattrat": ((188, 189, 190, 463), (5, 6, 7, 463)),
    "removexattr lremovexattr fremovexattr removexattrat": ((197, 198, 199, 466), (14, 15, 16, 466)),
    "file_setattr truncate": ((469, 76), (469, 45)),
    "link linkat symlink symlinkat mknod mknodat": ((86, 265, 88, 266, 133, 259), (37, 36, 33)),
    "ptrace process_vm_readv process_vm_writev pidfd_getfd": ((101, 310, 311, 438), (117, 270, 271, 438)),
    "tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal": ((200, 129, 297, 424), (130, 138, 240, 424)),
    "mount umount2 pivot_root chroot move_mount": ((165, 166, 155, 161, 429), (40, 39, 41, 51, 429)),
    "fsopen fsconfig fsmount fspick open_tree mount_setattr": ((430, 431, 432, 433, 428, 442),) * 2,
    "unshare setns": ((272, 308), (97, 268)),
    "open_by_handle_at quotactl acct swapon swapoff": ((304, 179, 163, 167, 168), (265, 60, 89, 224, 225)),
    "kexec_load kexec_file_load reboot": ((246, 320, 169), (104, 294, 142)),
    "init_module finit_module delete_module": ((175, 313, 176), (105, 273, 106)),
    "bpf perf_event_open userfaultfd": ((321, 298, 323), (280, 241, 282)),
    "add_key request_key keyctl": ((248, 249, 250), (217, 218, 219)),
    "io_uring_setup io_uring_enter io_uring_register": ((425, 426, 427),) * 2,
}
"""System calls that fail with EPERM: their numbers on x86_64 and on aarch64, which lacks some."""
_OF_ITSELF = {"kill tgkill": ((62, 234), (129, 131))}
"""The same, unless their first argument is the calling process."""
_OF_ITSELF_OR_0 = {"prlimit64": ((302,), (261,))}
"""The same, unless their first argument is the calling process or 0, which means it too."""
_CLONE, _CLONE3 = (56, 220), 435
"""clone() with new namespaces is refused. A filter cannot read clone3()'s arguments, so that fails as if the kernel
lacked it, and programs fall back to clone()."""

RIGHTS = {
    "r": _READ_FILE | _READ_DIRECTORY,
    "x": _READ_FILE | _READ_DIRECTORY | _EXECUTE,
    "s": _MAKE_SOCKET | _REMOVE_FILE,
}
"""Rights by the first letter of a rule; the path follows. A path that cannot be opened gets no rule."""

_ADDED_BY_LOADERS = ("_PYI_", "LD_LIBRARY_PATH", "LC_CTYPE")
"""Variables that a frozen app's loader and Python add to an environment."""


def version() -> int:
    """Return the kernel's Landlock version; 0 if it has none or it is disabled."""
    try:
        return _call(_CREATE_RULESET, None, 0, _TELL_VERSION)
    except OSError:
        return 0


def become(rules: Sequence[str], argv: Sequence[str]) -> NoReturn:
    """Confine this process by ``rules``, then execute ``argv``. Print a failure on standard error."""
    try:
        confine(rules)
    except OSError as error:
        _end(CANNOT_CONFINE, f"{argv[0]} cannot be confined: {error.strerror}")
    for number in _IGNORED_BY_PYTHON:
        _libc().signal(number, None)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_ADDED_BY_LOADERS)}
    try:
        os.execve(argv[0], list(argv), environment)  # noqa: S606 - its purpose
    except OSError as error:
        _end(CANNOT_EXECUTE, f"{argv[0]} cannot be executed: {error.strerror}")


def confine(rules: Sequence[str]) -> None:
    """Give up all rights to files except ``rules``, to gain privileges by exec, and to make the ``REFUSED`` calls.

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
    _refuse_calls()


def _refuse_calls() -> None:
    """Install the filter, if there is one, for this thread, which is the only one, and the program it executes."""
    if not (program := _filter(os.uname().machine, os.getpid())):
        return
    code = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _libc().prctl(
        _SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.c_char_p(head)
    )  # it fails on a kernel without seccomp, which is fine


def _filter(machine: str, pid: int) -> bytes:
    """Return the filter for the process ``pid`` as BPF; empty if the architecture has no list."""
    if machine not in _ARCHITECTURES or ctypes.sizeof(ctypes.c_void_p) != 8:
        return b""
    which = list(_ARCHITECTURES).index(machine)
    refuse, allow = _step(_RETURN, _FAIL | errno.EPERM), _step(_RETURN, _ALLOW)
    steps = [
        _step(_LOAD, _ARCHITECTURE),
        *(_step(_EQUALS, _ARCHITECTURES[machine], 1, 0), refuse),
        _step(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        steps += [_step(_AT_LEAST, _X32, 0, 1), refuse]
    steps += [_step(_EQUALS, _CLONE3, 0, 1), _step(_RETURN, _FAIL | errno.ENOSYS)]
    for numbers in REFUSED.values():
        for number in numbers[which]:
            steps += [_step(_EQUALS, number, 0, 1), refuse]
    for calls, allowed in ((_OF_ITSELF, (pid,)), (_OF_ITSELF_OR_0, (pid, 0))):
        tests = [step for value in allowed for step in (_step(_EQUALS, value, 0, 1), allow)]
        for number in (number for numbers in calls.values() for number in numbers[which]):
            steps += [_step(_EQUALS, number, 0, len(tests) + 2), _step(_LOAD, _FIRST_ARGUMENT), *tests, refuse]
    steps += [_step(_EQUALS, _CLONE[which], 0, 3), _step(_LOAD, _FIRST_ARGUMENT)]
    steps += [_step(_HAS_BITS, _NEW_NAMESPACES, 0, 1), refuse]
    return b"".join([*steps, allow])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


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
    """Run the wrapper with ``RULE… -- PROGRAM ARGUMENT…``."""
    end = words.index(END_OF_RULES)
    become(words[:end], words[end + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
