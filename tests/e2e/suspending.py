"""A manager to be killed: ``suspending.py JSON`` starts the machine with these options, and suspends it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import under


async def main() -> None:
    machine = await under.create(json.loads(sys.argv[1]))
    await machine.start()
    await tiny.tell(machine.info.ssh_port, "echo precious >/kept")
    print("suspending", flush=True)
    await machine.suspend()


asyncio.run(main())
