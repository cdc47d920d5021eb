"""``ovm start --foreground``: run the machine's service in the command's own process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING

from ovm.cli import SIGNAL_STATUS, run
from ovm.cli.outlet import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from ovm.cli.progress import Advance, Steps
    from ovm.model.info import Info
    from ovm.registry.machines import Machine
    from ovm.service.host import Host


def stay(machine: Machine, shown: Steps, announce: Callable[[Info], None]) -> int:
    """Run the machine until Ctrl-C, SIGTERM or its own power-off; return the exit status.

    Raises:
        OVMError: the machine failed.
    """
    return run(_stay(machine, shown, announce))


async def _stay(machine: Machine, shown: Steps, announce: Callable[[Info], None]) -> int:
    from ovm.service.run import serve

    telling: list[asyncio.Task[bool]] = []
    host = await serve(
        machine, listening=lambda host: telling.append(asyncio.create_task(_tell(host, shown, announce)))
    )
    was_ready = await telling[0]
    if host.died_of is not None:
        raise host.died_of
    if not host.stop_wanted:
        say(f"{machine.name} {'is suspended' if host.suspend_wanted else 'has powered itself off'}", err=True)
        return 0
    return 0 if was_ready else SIGNAL_STATUS + (host.stop_signal or signal.SIGINT)


async def _tell(host: Host, shown: Steps, announce: Callable[[Info], None]) -> bool:
    """Print the machine's events until it ends; return whether it was ever ready."""
    ready = False
    with contextlib.ExitStack() as drawn:
        advance: Advance | None = drawn.enter_context(shown.step(f"starting {host.name}"))
        async for told in host.history.follow(0):
            if told.name == "step":
                if ready and host.stop_wanted and advance is None:
                    advance = drawn.enter_context(shown.step(f"stopping {host.name}"))
                if advance is not None:
                    advance(told.step, 0, 0)
            elif told.name == "ready" and not ready:
                drawn.close()
                ready, advance = True, None
                announce(host.machine.info)
                say("Ctrl-C stops it.", err=True)
            elif told.name == "health" and told.health is not None:
                say(f"{host.name}: {'; '.join(told.health.problems) or 'healthy again'}", err=True)
            elif told.error is not None and ready:
                say(f"{host.name}: {told.error.message}", err=True)
    return ready
