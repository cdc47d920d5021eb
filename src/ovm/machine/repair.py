"""Decide whether a machine can survive the death of a helper, and restore its network."""

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
    """Replaces a gvproxy that dies during one run, if the hypervisor can connect to a new one."""

    def __init__(self, context: Context, reports: Reports, collaborators: Collaborators) -> None:
        self._context = context
        self._reports = reports
        self._collaborators = collaborators
        self.network_is_lost = False
        """Whether gvproxy died and could not be replaced."""

    async def can_heal(self, session: Session, culprit: Child) -> bool:
        """Return whether the machine can survive; false if the guest powered itself off.

        Raises:
            HelperExited: the machine cannot survive.
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
        """Return whether a reboot failed because ``gvproxy`` died, and the machine can survive.

        Raises:
            HelperExited: gvproxy died and cannot be replaced.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._collaborators.blame_wait_s):
                await gvproxy.wait()  # its death may be noticed after the failure it caused
        if gvproxy.running or await self._collaborators.blame(session, gvproxy) is not gvproxy:
            return False
        return await self.can_heal(session, gvproxy)

    async def heal(self, gvproxy: Child) -> None:
        """Replace a gvproxy that died; emit an ``error`` event for each port that could not be opened again.

        Raises:
            HelperExited: gvproxy could not be replaced.
        """
        assert self._context.monitor is not None
        try:
            lost = await self._context.monitor.heal(gvproxy)
        except HelperExited:
            self.network_is_lost = True
            raise
        for port in lost:
            self._context.events.emit("error", port)
