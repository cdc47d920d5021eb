"""Monitoring of a running machine: health checks, and repair of a lost network."""

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
"""Delay of the first health check after ready; the guest is busy until then."""
LOOK_S = 60.0
LOOK_AGAIN_S = 5.0
"""Interval of health checks while there is a health problem."""
GIVEN_UP_AFTER = 2
"""Number of consecutive health checks without any answer after which gvproxy is checked for a hang."""
HEAL_TIMEOUT_S = 30.0
"""Timeout of one attempt to replace gvproxy and reach the guest through the new one."""
HEAL_ATTEMPTS = 3


class Monitor:
    """Monitors one session."""

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
        """Result of the last health check, with problems reported since."""
        self._session = session
        self._driver = driver
        self._is_running = is_running
        self._changed = changed
        self._first_look_s = first_look_s
        self._look_again_s = look_again_s
        self._is_healing = False
        self._look_wanted = asyncio.Event()

    async def look(self) -> health.Look:
        """Run a health check now; report a change to listeners."""
        look = await health.look(self._session)
        if self._is_running() and not self._is_healing:
            self._update(look.health)
        return look

    def set_problems(self, *problems: str) -> None:
        """Replace the health problems without a check; clear them if none is given."""
        self._update(replace(self.health, problems=problems))

    def _update(self, now: Health) -> None:
        before, self.health = self.health, now
        if before.problems != now.problems:
            log.warning("health: %s", "; ".join(now.problems) or "no problems any more")
            self._changed(now)

    def look_soon(self) -> None:
        """Run the next health check without waiting for its interval."""
        self._look_wanted.set()

    async def keep_looking(self) -> None:
        """Check health each minute, more often while there is a problem; end a gvproxy that hangs. Never returns."""
        await asyncio.sleep(self._first_look_s)
        unreachable = 0
        while True:
            if self._is_running() and not self._is_healing:
                unreachable = 0 if (await self.look()).reachable else unreachable + 1
                with contextlib.suppress(WireError):
                    await self._session.network.settle()
                if unreachable >= GIVEN_UP_AFTER and self._driver.can_replug and await self._gvproxy_hangs():
                    log.warning("podman, the guest and gvproxy do not answer; replacing gvproxy")
                    await self._session.network.end()
                    unreachable = 0
            self._look_wanted.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self.health.ok else self._look_again_s):
                    await self._look_wanted.wait()

    async def _gvproxy_hangs(self) -> bool:
        """Return whether gvproxy itself hangs; if only the guest is slow, it answers later through this gvproxy."""
        network = self._session.network
        suspect = network.child
        # it may die and be replaced during the query
        return not await network.answers() and not self._is_healing and network.child is suspect and suspect.running

    async def heal(self, gvproxy: Child) -> list[PortError]:
        """Replace a gvproxy that died; return the ports that could not be opened again.

        Raises:
            HelperExited: gvproxy could not be replaced; has how the old one ended.
        """
        self._is_healing = True  # before the await: a health check must not run during the repair
        error = await gvproxy.exited("running")
        log.warning("the network is lost: %s", error)
        self.set_problems(f"the network is being restored: {error.message} ({error.exit_reason})")
        for attempt in range(1, HEAL_ATTEMPTS + 1):
            try:
                async with asyncio.timeout(HEAL_TIMEOUT_S):
                    lost = await self._session.restore_network(reach=self._is_running())
            except (OVMError, TimeoutError) as trouble:
                log.warning("could not restore the network: %s", str(trouble) or "no answer in time")
                if attempt == HEAL_ATTEMPTS:
                    raise error from trouble
            else:
                break
        self._is_healing = False
        self.set_problems()
        self.look_soon()
        return lost
