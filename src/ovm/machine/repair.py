"""Whether a machine can live on without a helper that has died, and how its network is brought back."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from ovm.errors import HelperExited
from ovm.machine.collaborators import Collaborators
from ovm.machine.context import Context
from ovm.machine.reports import Reports
from ovm.machine.running import Session
from ovm.process.child import Child

log = logging.getLogger(__name__)


class NetworkRepair:
    """Replaces the gvproxy of one run whenever it dies, where the hypervisor can do with another one."""

    def __init__(self, context: Context, reports: Reports, collaborators: Collaborators) -> None:
        self._context = context
        self._reports = reports
        self._collaborators = collaborators
        self.network_is_lost = False
        """Whether gvproxy died and could not be replaced."""

    async def can_heal(self, session: Session, culprit: Child) -> bool:
        """Return whether the machine can live on; one whose guest powered itself off need not.

        Raises:
            HelperExited: it cannot.
        """
        if culprit is session.network.child:
            if self._context.prepared.driver.can_replug:
                return True
            self.network_is_lost = True
        elif await self._reports.guest_powered_off(culprit):
            log.info("the guest powered itself off")
            return False
        raise await culprit.exited("running")

    async def was_the_cause(self, session: Session, gvproxy: Child) -> bool:
        """Return whether a reboot failed because ``gvproxy`` died, and the machine can live on.

        Raises:
            HelperExited: gvproxy died and cannot be replaced.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._collaborators.blame_wait_s):
                await gvproxy.wait()  # its death may be noticed after what it made fail
        if gvproxy.running or await self._collaborators.blame(session, gvproxy) is not gvproxy:
            return False
        return await self.can_heal(session, gvproxy)

    async def heal(self, gvproxy: Child) -> None:
        """Replace a gvproxy that died; each port that could not be opened again is an ``error`` event.

        Raises:
            HelperExited: there is none to be had.
        """
        assert self._context.monitor is not None
        try:
            lost = await self._context.monitor.heal(gvproxy)
        except HelperExited:
            self.network_is_lost = True
            raise
        for port in lost:
            self._context.events.emit("error", port)
