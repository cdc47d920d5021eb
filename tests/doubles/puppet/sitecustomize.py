"""Found by every Python with this directory in ``$PYTHONPATH``: a service that it runs holds a puppet, and no machine.

All else is real: process, lock, records, socket, signals. Files in the machine's ``orders`` directory rule the puppet.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

if os.environ.get("OVM_PUPPET"):
    from ovm.errors import StartError, StateError
    from ovm.model.events import Events
    from ovm.model.info import Health, Info
    from ovm.model.states import VMState, state_info
    from ovm.registry import create as registry

    AGAIN_S = 0.01

    class Silent:
        """A command's input, or output that never comes."""

        def write(self, _content: bytes) -> None:
            """Nobody reads it."""

        def write_eof(self) -> None:
            """Nor sees that it ends."""

        async def read(self, _count: int) -> bytes:
            await asyncio.Event().wait()
            return b""

    class Process:
        """A command that never says anything, nor ends."""

        stdin = stdout = stderr = Silent()

        async def wait(self) -> None:
            await asyncio.Event().wait()

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

    class Puppet:
        """What a service needs of a machine."""

        def __init__(self, machine):
            self.orders, self.state, self._events = machine.directory / "orders", VMState.STOPPED, Events()
            self.options = machine  # its log_dir is asked for
            self.on, self.closed = self._events.on, asyncio.Event()
            self.cut = asyncio.Event()
            self.ports_open = {}

        async def start(self, *, progress):
            self.state = VMState.STARTING
            self.closed.clear()
            progress("booting")
            await self._held("hold-start")
            if self.state is not VMState.STARTING:
                raise StateError("the start was cancelled")
            if (self.orders / "fail-start").exists():
                error = StartError("the puppet fell", stage="booting")
                self._down(error)
                raise error
            if (self.orders / "break-start").exists():
                raise ZeroDivisionError("a flaw")
            self.state = VMState.RUNNING
            self._events.emit("ready")

        async def stop(self, *, force=False, timeout_s=0.0, progress=lambda _: None):
            if force:
                self.cut.set()
            if self.state is VMState.STOPPED:
                return
            self.state = VMState.STOPPING
            progress("shutting down")
            await self._held("hold-stop")
            self._down()

        async def suspend(self, *, timeout_s):
            self.state = VMState.SAVING
            await self._held("hold-stop")
            self._down()

        async def reset_path(self, *, data):
            await self._held("hold-reset")

        async def wait_closed(self):
            await self.closed.wait()

        async def _held(self, order):
            (self.orders / f"reached-{order}").touch()
            while (self.orders / order).exists() and not self.cut.is_set():
                await asyncio.sleep(AGAIN_S)

        def _down(self, error=None):
            self.state = VMState.STOPPED
            if error:
                self._events.emit("error", error)
            self._events.emit("close")
            self.closed.set()

        async def vm_state(self):
            await self._held("hold-answer")
            return state_info(self.state)

        async def vm_pause(self):
            self.state = VMState.PAUSED

        async def vm_resume(self):
            self.state = VMState.RUNNING

        async def check_health(self):
            return Health()

        def process(self, *_, **__):
            return Process()

        @property
        def info(self):
            here = Path("/nowhere")
            return Info(
                podman_socket=here, podman_port=None, ssh_port=22, ssh_key=here, ssh_user="root", hypervisor="puppet",
                accelerator="none", accelerator_reason="a puppet", cpus=1, memory_mib=1, data_disk=here, log_dir=here,
                timings=(), health=Health(checked_at=time.time()),
            )  # fmt: skip

    async def create(machine):
        return Puppet(machine)

    registry.create_from_settings = create

    if seconds := os.environ.get("OVM_PUPPET_IMPATIENT"):
        from ovm.service import app, connection

        app.BODY_TIMEOUT_S = connection.HEAD_TIMEOUT_S = float(seconds)
