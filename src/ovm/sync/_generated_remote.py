"""A blocking machine. Written by scripts/sync.py; what it cannot know is in base.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ovm.guest.ssh import COLLECTED_MAX_BYTES
from ovm.model.defaults import STOP_TIMEOUT_S, SUSPEND_TIMEOUT_S
from ovm.model.events import Event
from ovm.model.info import Health, Info
from ovm.model.ports import Forward, Protocol
from ovm.model.results import ClockSync, ExecResult, Pruned
from ovm.model.states import StateInfo
from ovm.service import protocol as p
from ovm.service.remote import connect as connect_async
from ovm.sync.base import Remote
from ovm.sync.loop import Loop


class RemoteOVM(Remote):
    """A machine behind its service; :func:`ovm.sync.connect` makes one.

    What it is asked means what it means for :class:`OVM`. Every call raises ``StateError`` if the service is gone,
    and what the same call of :class:`OVM` raises.
    """

    def status(self) -> p.Status:
        """What the machine and its service are about, in every state."""
        return self._loop.run(self._async.status)

    def info(self) -> Info:
        """Where it is reached, and how it runs."""
        return self._loop.run(self._async.info)

    def vm_state(self) -> StateInfo:
        """Its state, as the hypervisor tells it now, and what can be asked of it."""
        return self._loop.run(self._async.vm_state)

    def check_health(self) -> Health:
        """Look at it now."""
        return self._loop.run(self._async.check_health)

    def vm_pause(self) -> None:
        """Pause its virtual CPUs; fine if they are paused."""
        self._loop.run(self._async.vm_pause)

    def vm_resume(self) -> None:
        """Let them run again, and set the guest's clock; fine if they run."""
        self._loop.run(self._async.vm_resume)

    def stop(self, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Shut the guest down; its service ends with it."""
        self._loop.run(self._async.stop, force=force, timeout_s=timeout_s)

    def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
        """Save its state to disk, for its next start to resume; its service ends with it."""
        self._loop.run(self._async.suspend, timeout_s=timeout_s)

    def reset_path(self, *, data: bool = False) -> None:
        """Stop it, restore its files (with ``data`` the data disk, too), and start it again."""
        self._loop.run(self._async.reset_path, data=data)

    def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's, and verify it."""
        return self._loop.run(self._async.clocksync)

    def ports(self) -> tuple[Forward, ...]:
        """What is open on the host for it."""
        return self._loop.run(self._async.ports)

    def export_port(
        self, host_port: int, guest_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1"
    ) -> Forward:
        """Lead a port of the host, any free one for 0, to a port of the guest; returns what was bound."""
        return self._loop.run(self._async.export_port, host_port, guest_port, protocol=protocol, address=address)

    def unexport_port(self, host_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1") -> None:
        """Close what :meth:`export_port` opened."""
        self._loop.run(self._async.unexport_port, host_port, protocol=protocol, address=address)

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        on_stdout: Callable[[bytes], object] | None = None,
        on_stderr: Callable[[bytes], object] | None = None,
        max_output_bytes: int | None = COLLECTED_MAX_BYTES,
    ) -> ExecResult:
        """Run a command as root in the guest; see :meth:`OVM.exec`."""
        return self._loop.run(
            self._async.exec,
            argv,
            stdin=stdin,
            environment=environment,
            timeout_s=timeout_s,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
            max_output_bytes=max_output_bytes,
        )

    def prune(self, *, everything: bool = False, volumes: bool = False) -> Pruned:
        """Have podman remove what nothing uses, and give the host back the room."""
        return self._loop.run(self._async.prune, everything=everything, volumes=volumes)

    def logs(self) -> dict[str, Path]:
        """The files of its logs, by name: ``console`` is the guest's own."""
        return self._loop.run(self._async.logs)

    def history(self, *, after: int = 0) -> list[Event]:
        """What has happened behind the event number ``after``, the steps of starts and stops included."""
        return self._loop.run(self._async.history, after=after)


def connect(name: str = "default") -> RemoteOVM:
    """The machine called ``name``, which its service runs: one that ``ovm start`` or another program has started.

    Raises:
        StateError: there is no such service.
        SkewError: it is of a version of ovm that this one does not understand.
    """
    loop = Loop.current()
    return RemoteOVM(loop, loop.run(connect_async, name))
