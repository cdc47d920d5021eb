"""What may lie where ovm expects a file of its own: pipes, devices, gigabytes, odd TOML and JSON."""

from __future__ import annotations

import os
import resource
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

Put = Callable[[Path], object]

HUGE_BYTES = 3 << 30
DEADLINE_S = 20.0
"""For a reader that must not wait at all, on a machine with other things to do."""
MEMORY_BYTES = 512 << 20
"""A reader may take so much more than the process has already."""


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, HUGE_BYTES)


def a_socket(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # a socket's path is short
        made = Path(directory, "s")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(made))
        made.rename(path)


def link_to(target: str) -> Put:
    return lambda path: path.symlink_to(target)


def text(content: str | bytes) -> Put:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


NO_FILES: Mapping[str, Put] = {
    "pipe": os.mkfifo,
    "directory": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "zeros": link_to("/dev/zero"),
    "huge": huge,
    "socket": a_socket,
    "through a file": link_to("/dev/null/x"),
}
"""None of these can be read to an end, or at all."""

ODD_TOML: Mapping[str, Put] = {
    "deep lists": text("cpus = " + "[" * 30_000 + "]" * 30_000),
    "deep tables": text("environment = " + "{a=" * 12_000 + "1" + "}" * 12_000),
    "many digits": text("cpus = " + "9" * 5000),
    "many hexadecimal digits": text("cpus = 0x" + "f" * 50_000),
    "many octal digits in a list": text("ports = [0o" + "7" * 50_000 + "]"),
    "dots": text("a." * 50_000 + "a = 1"),
    "fewer dots": text("a." * 30_000 + "a = 1"),
    "dots in a header": text("[" + "a." * 30_000 + "a]"),
    "dots that are deep": text("environment" + ".a" * 900 + " = 1"),
    "a long key": text("k" * 60_000 + " = 1"),
    "a long line": text('hostname = "' + "h" * 60_000 + '"'),
    "infinite": text("cpus = inf"),
    "no number": text("memory = nan"),
    "a date": text("disk = 2020-01-01T00:00:00Z"),
    "an impossible date": text("disk = 2020-13-41T99:00:00Z"),
    "a truth": text("cpus = true"),
    "escapes in a key": text('"\\u001b[2J\\u202e\\r\\n" = 1'),
    "escapes in a value": text('hostname = "\\u001b]0;x\\u0007"'),
    "escapes in a variable": text('environment = { "\\u001b[2J" = 1 }'),
    "an escape by itself": text(b"cpus = \x1b[2J"),
    "no text": text(b"\xff\xfe\x00"),
    "NUL": text(b"cpus = 2\0"),
    "many mounts": text("mounts = [" + '"/a/b:/c",' * 6_000 + "]"),
    "no user": text('mounts = ["~nobody-of-this-name/x"]'),
    "one name twice": text("cpus = 1\ncpus = 2"),
    "dots in many lines": text("".join(f"environment.v{n}{'.a' * 900} = 1\n" for n in range(30))),
    "too much": text("# " + "x" * 70_000),
    "many tables": text("[[ports]]\n" * 6_000),
}
"""Each is refused as settings, with a reason of one line."""

ODD_JSON: Mapping[str, Put] = {
    "empty": text(b""),
    "deep": text(b"[" * 100_000),
    "deep objects": text(b'{"pid":' * 50_000 + b"1" + b"}" * 50_000),
    "a list": text(b"[]"),
    "a number": text(b"1"),
    "nothing": text(b"null"),
    "many digits": text(b'{"pid": ' + b"9" * 5000 + b"}"),
    "wrong types": text(b'{"pid": "1", "at": true, "reason": 3, "started": 1.5, "socket_dir": [], "message": {}}'),
    "no text": text(b"\xff\xfe"),
    "lone surrogate": text(b'{"at": 1.0, "reason": "failed", "message": "\\ud800\\u001b[2J\\n"}'),
    "infinite": text(b'{"at": Infinity, "reason": "failed"}'),
}


@contextmanager
def bounded() -> Iterator[None]:
    """What waits without end is interrupted, and what reads gigabytes gets no memory for them."""

    def interrupt(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, interrupt)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
