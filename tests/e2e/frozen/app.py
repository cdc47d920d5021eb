"""An app to be frozen: ``app group DIRECTORY``, ``app machine OPTIONS`` or ``app facts``. Ends when its input ends."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from pathlib import Path

import ovm


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


async def tell_and_wait(**facts: object) -> None:
    """Until told to end. Nothing is imported once it has told: its files may be gone by then."""
    told_to_end = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    tell(**facts)
    await told_to_end


async def group(directory: Path) -> None:
    """A confined helper in a guarded group."""
    from ovm.process.child import process_group
    from ovm.process.confine import Rights

    with (directory / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    async with process_group([], log_path=directory / "guard.log") as processes:
        command = ["/bin/sh", "-c", "env; exec sleep 600"]
        helper = await processes.spawn("helper", command, log_path=directory / "helper.log", rights=Rights())
        await tell_and_wait(manager=os.getpid(), guard=processes.guard.pid, helper=helper.pid)


async def machine(options: str) -> None:
    """A machine that runs."""
    given = json.loads(options)
    create = ovm.create_darwin_ovm if "vfkit" in given["origin_path"] else ovm.create_linux_ovm
    async with await create(given):
        await tell_and_wait(manager=os.getpid())


def facts() -> None:
    """What else has to be the same as in an ordinary Python."""
    from ovm.image import build

    tell(
        frozen=bool(getattr(sys, "frozen", False)),
        guest_files={name: hashlib.sha256(content).hexdigest() for name, content in build.guest_files()},
        names=[name for name in ovm.__all__ if getattr(ovm, name)],
        builders_libraries=build._environment().get("LD_LIBRARY_PATH"),
    )


def main() -> None:
    try:
        match sys.argv[1:]:
            case ["group", directory]:
                asyncio.run(group(Path(directory)))
            case ["machine", options]:
                asyncio.run(machine(options))
            case ["facts"]:
                facts()
            case others:
                sys.exit(f"not for this app: {others}")
    except ovm.OVMError as error:
        tell(error=type(error).__name__, message=error.message, hint=error.hint)
        sys.exit(1)


if __name__ == "__main__":
    main()
