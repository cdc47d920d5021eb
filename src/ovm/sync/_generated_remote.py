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
    """A machine that its service runs; :func:`ovm.sync.connect` returns one.

    Methods work as those of :class:`OVM` and raise the same errors, and ``StateError`` if the service has ended.
    """

    def status(self) -> p.Status:
        """Return the status of the machine and its service, in every state."""
        return self._loop.run(self._async.status)

    def info(self) -> Info:
        """Return the machine's addresses and configuration."""
        return self._loop.run(self._async.info)

    def vm_state(self) -> StateInfo:
        """Query the hypervisor for the state and the possible transitions."""
        return self._loop.run(self._async.vm_state)

    def check_health(self) -> Health:
        """Check the machine's health now."""
        return self._loop.run(self._async.check_health)

    def vm_pause(self) -> None:
        """Pause the machine; does nothing if it is paused."""
        self._loop.run(self._async.vm_pause)

    def vm_resume(self) -> None:
        """Resume the machine and set the guest's clock; does nothing if it runs."""
        self._loop.run(self._async.vm_resume)

    def stop(self, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Shut the guest down; its service ends, too."""
        self._loop.run(self._async.stop, force=force, timeout_s=timeout_s)

    def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
        """Save the machine's state on disk for the next start to resume; its service ends, too."""
        self._loop.run(self._async.suspend, timeout_s=timeout_s)

    def reset_path(self, *, data: bool = False) -> None:
        """Stop the machine, restore its files (with ``data`` also the data disk), and start it again."""
        self._loop.run(self._async.reset_path, data=data)

    def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's, and verify it."""
        return self._loop.run(self._async.clocksync)

    def ports(self) -> tuple[Forward, ...]:
        """List the host ports that are forwarded to the guest."""
        return self._loop.run(self._async.ports)

    def export_port(
        self, host_port: int, guest_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1"
    ) -> Forward:
        """Forward a host port to a guest port; 0 picks a free host port. Returns the forward."""
        return self._loop.run(self._async.export_port, host_port, guest_port, protocol=protocol, address=address)

    def unexport_port(self, host_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1") -> None:
        """Remove a forward of :meth:`export_port`."""
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
        """Delete unused podman data, and return the space to the host."""
        return self._loop.run(self._async.prune, everything=everything, volumes=volumes)

    def logs(self) -> dict[str, Path]:
        """Return the paths of the logs, by name: ``console`` is the guest's own."""
        return self._loop.run(self._async.logs)

    def history(self, *, after: int = 0) -> list[Event]:
        """Return the past events after number ``after``, including the steps of starts and stops."""
        return self._loop.run(self._async.history, after=after)


def connect(name: str = "default") -> RemoteOVM:
    """Connect to the running machine ``name``, which ``ovm start`` or another program has started.

    Raises:
        StateError: no service runs the machine.
        SkewError: the service runs an incompatible version of ovm.
    """
    loop = Loop.current()
    return RemoteOVM(loop, loop.run(connect_async, name))
