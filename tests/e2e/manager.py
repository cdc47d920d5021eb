"""A manager to be killed: ``manager.py JSON`` starts the machine with these options, and stays."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import under


async def main() -> None:
    machine = await under.create(json.loads(sys.argv[1]))
    print("starting", flush=True)
    await machine.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
