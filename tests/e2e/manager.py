"""A manager to be killed: ``manager.py JSON`` starts the machine with these options, and stays."""

from __future__ import annotations

import asyncio
import json
import sys

import ovm


async def main() -> None:
    machine = await ovm.create_linux_ovm(json.loads(sys.argv[1]))
    print("starting", flush=True)
    await machine.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
