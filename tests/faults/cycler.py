"""A manager that starts and stops a machine, again and again: ``cycler.py JSON``; nothing of it may grow.

Prints a line of JSON for each cycle, with what it found that should not be there, and what it measured of itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import ovm
import processes
import tiny
import under
from adopted import below

FRESH_EVERY = 50
"""How many cycles one object lives through."""
WHOLE_EVERY = 25
"""After how many cycles everything is looked at, files and all; processes, descriptors and the like are each time."""
GOING_S = 10.0
LOOK_S = 0.01
LOG_MOST_BYTES = 1 << 20
SETTLED = 10
"""After so many cycles every file is there that is kept, three logs of each kind among them."""
MEASURE_EVERY = 5


class Own:
    """What this process has."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.descriptors = processes.own_descriptors()
        self.tasks = asyncio.all_tasks()
        self.signals = signals()
        self.files: set[str] = set()

    async def more(self) -> list[str]:
        """What there is now and was not at first; looked for until it is gone, or GOING_S."""
        deadline = time.monotonic() + GOING_S
        while (found := self._more()) and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_S)
        return found

    def _more(self) -> list[str]:
        found = [f"process {pid} {state} {processes.command(pid)}" for pid, state in below(os.getpid()).items()]
        found += [f"descriptor {name}" for name in (processes.own_descriptors() - self.descriptors).elements()]
        found += [f"task {task}" for task in asyncio.all_tasks() - self.tasks]
        found += [f"socket {path}" for path in self.root.glob("*/socket/*") if path.name != "ovm.lock"]
        found += [f"thread {name}" for name in threads()]
        found += [f"signal {number}" for number, how in signals().items() if how != self.signals[number]]
        return found

    def whole(self) -> list[str]:
        """Processes of any parent, locks, files."""
        found = [f"holder {pid} {processes.command(pid)}" for pid in processes.holders(self.root)]
        found += [f"lock {path}" for path in self.root.glob("*/*/ovm.lock") if tiny._is_locked(path)]
        files = {str(path) for path in self.root.rglob("*")}
        found += [f"file {path}" for path in files - (self.files or files)]
        self.files = self.files or files
        logs = {path: path.stat().st_size for path in self.root.glob("*/log/*")}
        found += [f"log {path} of {size} bytes" for path, size in logs.items() if size > LOG_MOST_BYTES]
        return found


def threads() -> list[str]:
    """Those there are besides the main one, and the event loop's pool, which keeps what it has."""
    known = threading.enumerate()
    found = [thread.name for thread in known if not thread.name.startswith(("MainThread", "asyncio_"))]
    return found + ["of nobody's"] * (len(list(Path("/proc/self/task").iterdir())) - len(known))


def signals() -> dict[int, Any]:
    """What is done at each signal."""
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def memory() -> dict[str, int]:
    """Python's objects and blocks, and the process's own memory in KiB, without garbage and without Python's caches.

    The cache of attribute look-ups has 4096 entries, and each keeps the name it was asked for. C code asks with a new
    string each time (``PyObject_GetAttrString``), so the cache fills for some hundred cycles, eight blocks in each.
    """
    clear_lookups()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what is free, but kept, comes and goes by megabytes
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (dirty,) = (int(line.split()[1]) for line in rollup if line.startswith("Private_Dirty:"))
    return {"blocks": sys.getallocatedblocks(), "dirty_kib": dirty, "objects": len(gc.get_objects())}


def clear_lookups() -> None:
    """Empty Python's cache of attribute look-ups."""
    (sys._clear_internal_caches if sys.version_info >= (3, 13) else sys._clear_type_cache)()


async def main() -> None:
    given = json.loads(sys.argv[1])
    root = Path(given["root"])
    machine = await under.create(given["options"])
    told: Counter[str] = Counter()
    own = Own(root)
    for cycle in range(1, given["cycles"] + 1):
        if cycle % FRESH_EVERY == 0:
            machine = await under.create(given["options"])
        removers = [machine.on(name, lambda *_, name=name: told.update([name])) for name in ("ready", "error", "close")]
        told.clear()
        began = time.monotonic()
        found = []
        try:
            await machine.start()
            await machine.stop(force=cycle % 2 == 0)
        except ovm.OVMError as error:
            found += [f"error {error}"]
        seconds = time.monotonic() - began
        for remove in removers:
            remove()
        if told != {"ready": 1, "close": 1}:
            found += [f"events {dict(told)}"]
        found += await own.more()
        if cycle % WHOLE_EVERY == 0 or cycle == SETTLED:
            found += await asyncio.to_thread(own.whole)
        line = {"cycle": cycle, "seconds": seconds, "found": found}
        if cycle % MEASURE_EVERY == 0:
            line |= memory()
        print(json.dumps(line), flush=True)


asyncio.run(main())
