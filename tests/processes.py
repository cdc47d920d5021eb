"""What the system tells of processes: Linux in /proc, macOS by lsof, ps and /dev/fd."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ASK_TIMEOUT_S = 60.0
SHOWN = 200
GONE = "gone"


class Proc:
    """As /proc has it."""

    def holders(self, root: Path) -> list[int]:
        """Processes other than this one that have a file below ``root`` open.

        It looks again until there is nobody new: else a child would be missed whose parent died during the look.
        """
        found = []
        seen = {os.getpid()}
        while new := {int(process.name) for process in Path("/proc").iterdir() if process.name.isdigit()} - seen:
            seen |= new
            for pid in sorted(new):
                with contextlib.suppress(OSError):
                    links = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
                    if any(link.startswith(f"{root}/") for link in links):
                        found.append(pid)
        return found

    def command(self, pid: int) -> str:
        """The beginning of a command line; empty of a zombie."""
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            return words.decode(errors="replace").rstrip()[:SHOWN]
        return GONE

    def zombies(self) -> list[int]:
        """Children of this process that have ended, which nobody has waited for."""
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        states = {}
        for pid in children:
            with contextlib.suppress(OSError):
                states[int(pid)] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return [pid for pid, state in states.items() if state == "Z"]

    def stands_still(self, pid: int) -> bool:
        """Whether all threads of a process are stopped."""
        with contextlib.suppress(OSError):
            threads = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
            return all(thread.rpartition(")")[2].split()[0] == "T" for thread in threads)
        return False

    def own_descriptors(self) -> Counter[str]:
        """What this process has open, by kind where the name changes with each."""
        found: Counter[str] = Counter()
        for fd in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                link = str(fd.readlink())
                found[link.partition(":")[0] if link.startswith(("socket:", "pipe:")) else link] += 1
        return found


class Tools:
    """As lsof, ps and /dev/fd have it on macOS; what they are asked is what those of Linux understand, too."""

    def holders(self, root: Path) -> list[int]:
        """As :meth:`Proc.holders`, of this user's processes.

        Not ``lsof +D``: it would look at each file below ``root``, and trip over those that vanish meanwhile.
        """
        # its status is 1 whenever there was something that it could not look at
        told = _ask("lsof", "-nPw", "-u", str(os.getuid()), "-F", "pfn").splitlines()
        assert f"p{os.getpid()}" in told, "lsof does not even know of us"
        root = root.resolve()  # /tmp is a link on macOS
        found: dict[int, None] = {}
        pid, numbered = 0, False
        for line in told:
            kind, value = line[:1], line[1:]
            if kind == "p":
                pid = int(value)
            elif kind == "f":
                numbered = value.isdigit()  # else a working directory, a program's text and the like
            elif kind == "n" and numbered and value.startswith(f"{root}/"):
                found[pid] = None
        return [pid for pid in found if pid != os.getpid()]

    def command(self, pid: int) -> str:
        """As :meth:`Proc.command`."""
        # one -o for each: behind a = all is a heading on macOS
        told = _ask("ps", "-ww", "-o", "stat=", "-o", "command=", "-p", str(pid)).strip()
        if not told:
            return GONE
        state, _, words = told.partition(" ")
        return "" if state.startswith("Z") else words.strip()[:SHOWN]

    def zombies(self) -> list[int]:
        """As :meth:`Proc.zombies`."""
        told = [line.split() for line in _ask("ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat=").splitlines()]
        return [int(pid) for pid, parent, state in told if int(parent) == os.getpid() and state.startswith("Z")]

    def stands_still(self, pid: int) -> bool:
        """As :meth:`Proc.stands_still`, as far as the process as a whole goes."""
        return _ask("ps", "-o", "stat=", "-p", str(pid)).strip().startswith("T")

    def own_descriptors(self) -> Counter[str]:
        """As :meth:`Proc.own_descriptors`; a kqueue is a pipe."""
        found: Counter[str] = Counter()
        for fd in (int(path.name) for path in Path("/dev/fd").iterdir()):
            with contextlib.suppress(OSError):  # the one it was read by is closed
                mode = os.fstat(fd).st_mode
                found["socket" if stat.S_ISSOCK(mode) else "pipe" if stat.S_ISFIFO(mode) else _path(fd)] += 1
        return found


def _ask(*argv: str) -> str:
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False
    ).stdout


def _path(fd: int) -> str:
    getpath = getattr(fcntl, "F_GETPATH", None)  # macOS alone has it, and there /dev/fd has no links
    if getpath is None:
        return str(Path(f"/dev/fd/{fd}").readlink())
    try:
        return fcntl.fcntl(fd, getpath, bytes(1024)).rstrip(b"\0").decode(errors="replace")
    except OSError:
        return "nameless"


here = Proc() if sys.platform == "linux" else Tools()
holders, command, zombies, own_descriptors = here.holders, here.command, here.zombies, here.own_descriptors


def freeze(pid: int) -> None:
    """Stop a process: the signal alone returns while threads of it may still answer."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + ASK_TIMEOUT_S
    while not here.stands_still(pid):
        assert time.monotonic() < deadline, f"{pid} does not stop: {command(pid)}"
        time.sleep(0.002)
