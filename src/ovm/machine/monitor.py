"""What is done for a machine while it runs: it is looked at, and a network that dies is brought back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from msgspec.structs import replace

from ovm.errors import OVMError, PortError
from ovm.hypervisors import Driver
from ovm.machine import health
from ovm.machine.running import Session
from ovm.model.info import Health
from ovm.process.child import Child
from ovm.wire.error import WireError

log = logging.getLogger(__name__)

FIRST_LOOK_S = 2.0
"""When a machine that has just become ready is looked at; until then it has other things to do."""
LOOK_S = 60.0
LOOK_AGAIN_S = 5.0
"""Between two looks at a machine that is not well."""
GIVEN_UP_AFTER = 2
"""So many looks at a machine that nothing answers from, and its gvproxy is asked whether it hangs."""
HEAL_TIMEOUT_S = 30.0
"""From gvproxy's death until the guest is reached by way of another one."""
HEAL_ATTEMPTS = 3


class Monitor:
    """Looks after one session."""

    def __init__(
        self,
        session: Session,
        driver: Driver,
        *,
        is_running: Callable[[], bool],
        changed: Callable[[Health], object],
        first_look_s: float = FIRST_LOOK_S,
        look_again_s: float = LOOK_AGAIN_S,
    ) -> None:
        self.health = Health()
        """What the last look has found, or what is known since."""
        self._session = session
        self._driver = driver
        self._is_running = is_running
        self._changed = changed
        self._first_look_s = first_look_s
        self._look_again_s = look_again_s
        self._is_healing = False
        self._look_wanted = asyncio.Event()

    async def look(self) -> health.Look:
        """Look now; whoever listens hears of a change."""
        look = await health.look(self._session)
        if self._is_running() and not self._is_healing:
            self._update(look.health)
        return look

    def set_problems(self, *problems: str) -> None:
        """Replace the problems by what is known without a look; none if none is given."""
        self._update(replace(self.health, problems=problems))

    def _update(self, now: Health) -> None:
        before, self.health = self.health, now
        if before.problems != now.problems:
            log.warning("health: %s", "; ".join(now.problems) or "well again")
            self._changed(now)

    def look_soon(self) -> None:
        """Do not wait for the next look's turn."""
        self._look_wanted.set()

    async def keep_looking(self) -> None:
        """For ever: a look each minute, sooner at what is not well. A gvproxy that hangs is ended, to be replaced."""
        await asyncio.sleep(self._first_look_s)
        unreachable = 0
        while True:
            if self._is_running() and not self._is_healing:
                unreachable = 0 if (await self.look()).reachable else unreachable + 1
                with contextlib.suppress(WireError):
                    await self._session.network.settle()
                if unreachable >= GIVEN_UP_AFTER and self._driver.can_replug and await self._gvproxy_hangs():
                    log.warning("neither podman nor the guest answers, nor does gvproxy, which is replaced")
                    await self._session.network.end()
                    unreachable = 0
            self._look_wanted.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self.health.ok else self._look_again_s):
                    await self._look_wanted.wait()

    async def _gvproxy_hangs(self) -> bool:
        """Whether it is gvproxy that does not answer; a guest that is slow answers later, by way of this gvproxy."""
        network = self._session.network
        suspect = network.child
        # it may die, and another take its place, while it is asked
        return not await network.answers() and not self._is_healing and network.child is suspect and suspect.running

    async def heal(self, gvproxy: Child) -> list[PortError]:
        """Another gvproxy for one that died; returns the ports that could not be opened again.

        Raises:
            HelperExited: there is none to be had: how the last one died.
        """
        self._is_healing = True
        error = await gvproxy.exited("running")
        log.warning("the network is lost: %s", error)
        self.set_problems(f"the network is being brought back: {error.message} ({error.exit_reason})")
        for attempt in range(1, HEAL_ATTEMPTS + 1):
            try:
                async with asyncio.timeout(HEAL_TIMEOUT_S):
                    lost = await self._session.restore_network(reach=self._is_running())
            except (OVMError, TimeoutError) as trouble:
                log.warning("the network could not be brought back: %s", str(trouble) or "no answer in time")
                if attempt == HEAL_ATTEMPTS:
                    raise error from trouble
            else:
                break
        self._is_healing = False
        self.set_problems()
        self.look_soon()
        return lost
