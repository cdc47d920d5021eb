"""A manager that kills itself: ``victim.py JSON`` lives through all phases of a machine's life, or until its moment.

The moments of a phase are what this process asks of the system in it, counted by an audit hook; the code that is
tried knows nothing of it. Without a phase to die in it lives to the end, and tells how many moments and seconds each
phase had.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import under

NEXT = {"guard": "network", "network": "hypervisor", "hypervisor": "guest", "guest": "ready"}
"""Which step of a start comes after which."""
IDLE_S = 0.5
"""How long nothing is asked of a machine that runs, or is paused."""
ASKING = ("os.", "socket.", "subprocess.", "fcntl.")
LOOKING = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}
"""Python itself does this, for its imports."""


class Fate:
    """Where this process is in its life, and when it is to die."""

    def __init__(self, root: str, phase: str = "", moment: int = 0, delay_s: float = 0.0) -> None:
        self.root, self.fatal, self.moment, self.delay_s = root, phase, moment, delay_s
        self.phase = ""
        self.moments: dict[str, int] = {}
        self.began: dict[str, float] = {}
        self.pid = os.getpid()

    def enter(self, phase: str) -> None:
        """The next phase begins; nobody lives past the one he is to die in."""
        if self.fatal and self.phase == self.fatal:
            self.strike()
        self.phase = phase
        self.moments[phase] = -1
        self.began[phase] = time.monotonic()
        self.pass_moment()

    def pass_moment(self) -> None:
        """One more; after the right one time is up, at once or in ``delay_s``."""
        self.moments[self.phase] += 1
        if self.fatal and (self.phase, self.moments[self.phase]) == (self.fatal, self.moment):
            if not self.delay_s:
                self.strike()
            timer = threading.Timer(self.delay_s, self.strike)
            timer.daemon = True
            timer.start()

    def strike(self) -> None:
        """What is measured begins here, so it is told here."""
        os.write(1, f"struck {time.monotonic()}\n".encode())
        os.kill(self.pid, signal.SIGKILL)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook."""
        if os.getpid() != self.pid or not self.phase:
            return
        if event == "open":
            counts = str(arguments[0]).startswith(self.root)
        else:
            counts = event.startswith(ASKING) and event not in LOOKING
        if counts:
            self.pass_moment()

    def told(self) -> dict[str, tuple[int, float]]:
        """Moments and seconds of each phase that is over."""
        ends = [*list(self.began.values())[1:], time.monotonic()]
        return {
            phase: (self.moments[phase], end - began)
            for (phase, began), end in zip(self.began.items(), ends, strict=True)
            if phase != "over"
        }


async def live(fate: Fate, given: dict[str, Any]) -> None:
    """All of a life."""
    fate.enter("create")
    machine = await under.create(given["options"])
    done = machine._context.step_done

    def step(name: str) -> None:
        done(name)
        if fate.phase == name and name in NEXT:
            fate.enter(NEXT[name])
            if fate.phase == "hypervisor":
                keep_company(given["company"])

    machine._context.step_done = step  # type: ignore[method-assign]
    fate.enter("guard")
    await machine.start()
    fate.enter("running")
    await asyncio.sleep(IDLE_S)
    fate.enter("pausing")
    await machine.vm_pause()
    fate.enter("paused")
    await asyncio.sleep(IDLE_S)
    fate.enter("resuming")
    await machine.vm_resume()
    fate.enter("exporting")
    forward = await machine.export_port(0, 22)
    await machine.unexport_port(forward.host_port)
    fate.enter("rebooting")
    ready = asyncio.Event()
    machine.on("ready", ready.set)
    await tiny.order(machine.info.ssh_port, "busybox reboot -f")
    await ready.wait()
    fate.enter("stopping")
    await machine.stop(force=given["force"])
    fate.enter("over")


def keep_company(kind: str) -> None:
    """A child of the manager's own that outlives it: a fork holds all that the manager has open."""
    if kind == "forked":
        pid = os.fork()
        while not pid:
            signal.pause()
    elif kind == "executed":
        pid = subprocess.Popen(["sleep", "600"], close_fds=False).pid
    else:
        return
    os.write(1, f"company {pid}\n".encode())


def run(given: dict[str, Any]) -> None:
    """A life in this thread of this process."""
    fate = Fate(given["root"], *given["fate"])
    sys.addaudithook(fate.hear)
    asyncio.run(live(fate, given))
    os.write(1, f"lived {json.dumps(fate.told())}\n".encode())


def main() -> None:
    given = json.loads(sys.argv[1])
    match given["how"]:
        case "in a thread":
            thread = threading.Thread(target=run, args=[given])
            thread.start()
            thread.join()
        case "in a fork" if pid := os.fork():
            os.waitpid(pid, 0)
        case _:
            run(given)


if __name__ == "__main__":
    main()
