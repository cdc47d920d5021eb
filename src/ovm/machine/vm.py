"""The machine's public class."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ovm.disks.verify import FileState, verify
from ovm.errors import GuestError, OptionError, StateError
from ovm.guest.ssh import COLLECTED_MAX_BYTES
from ovm.machine import prepare
from ovm.machine.collaborators import Collaborators
from ovm.machine.context import Context
from ovm.machine.lifecycle import Lifecycle
from ovm.machine.pause import PauseControl
from ovm.machine.prune import prune
from ovm.machine.suspend import check as check_suspension
from ovm.model.defaults import STOP_TIMEOUT_S, SUSPEND_TIMEOUT_S
from ovm.model.events import Event, EventName, Events, Listener
from ovm.model.info import Health, Info
from ovm.model.ports import Forward, Protocol
from ovm.model.results import ClockSync, ExecResult, Pruned
from ovm.model.states import StateInfo, VMState, state_info
from ovm.model.validation import check_address, check_port
from ovm.paths import KeyPaths, TargetPaths

if TYPE_CHECKING:
    import asyncssh

READY_TIMEOUT_S = 180.0
"""Default time from the hypervisor's start to the guest's ready; emulated guests on busy hosts are slow."""


class OVM:
    """A virtual machine that runs Podman. Create one with :func:`ovm.create_linux_ovm` or :func:`ovm.create_ovm`.

    ``async with machine:`` starts and stops it. One object can be started and stopped any number of times. It belongs
    to the event loop that started it: when that loop ends, the guest is shut down.
    """

    def __init__(self, prepared: prepare.Prepared, collaborators: Collaborators | None = None) -> None:
        self.options = prepared.options
        self._events = Events()
        self._context = Context(prepared, self._events)
        self._pause = PauseControl(self._context)
        self._life = Lifecycle(self._context, self._pause, collaborators or Collaborators())

    def __repr__(self) -> str:
        return f"<OVM {self.options.target_dir} {self.state.removeprefix('VirtualMachineState')}>"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- start and stop

    async def start(
        self,
        *,
        resume: bool = True,
        timeout_s: float = READY_TIMEOUT_S,
        progress: Callable[[str], object] | None = None,
    ) -> None:
        """Boot, or resume what :meth:`suspend` saved; returns when podman answers.

        A saved state that no longer matches the machine is deleted and the guest boots; ``info.not_resumed`` says
        why. A failed or cancelled start leaves nothing behind.

        Args:
            resume: Whether to resume a saved state; if not, it is deleted.
            timeout_s: Seconds from the hypervisor's start to the guest's ready.
            progress: Called with the name of each completed stage; ``info.timings`` has the same names.

        Raises:
            StateError: the machine is not stopped.
            InUseError: another process owns one of the directories.
            FileError: a file or directory of the machine is missing or cannot be used.
            HelperError: a helper cannot be executed.
            PortError: no port is free for ssh or podman.
            StartError: the machine did not start; has the stage, how a helper ended, and the end of its log.
            GuestError: the guest reported that it is ready, but cannot be reached.
        """
        await self._life.start(resume=resume, timeout_s=timeout_s, progress=progress)

    async def stop(
        self,
        *,
        force: bool = False,
        timeout_s: float = STOP_TIMEOUT_S,
        progress: Callable[[str], object] | None = None,
    ) -> None:
        """Shut the guest down and end every helper; do nothing if the machine is stopped.

        The guest gets a request to power off, then its power button is pressed. After ``timeout_s`` seconds, or if no
        request reaches the guest, its power is cut. A second stop joins the first (and may force it). A stop during a
        start cancels the start. A stop that has begun completes even if the caller is cancelled.

        Args:
            force: Cut the power at once. The guest loses what it has not flushed, as in a power failure.
            timeout_s: Seconds the guest may take to shut down; a second stop keeps the first one's timeout.
            progress: Called with each step, as text for people.

        Raises:
            OptionError: ``timeout_s`` is negative.
            StopError: a helper could not be ended.
        """
        if timeout_s < 0:
            raise OptionError(f"timeout_s={timeout_s!r} is negative")
        await self._life.stop(force=force, timeout_s=timeout_s, progress=progress)

    async def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
        """Save the guest's state to disk and end every process; the next :meth:`start` resumes it.

        Containers continue where they were; their clients must reconnect. A paused machine runs after that start. The
        next start deletes the saved state in any case. If files, options, QEMU or the data disk have changed by then,
        the guest boots as after a power failure. A running guest syncs its file systems first. The saved state takes
        up to ``memory_mib`` of disk.

        A suspend that has begun completes even if the caller is cancelled; a :meth:`stop` overrides it.

        Args:
            timeout_s: Seconds the hypervisor may take.

        Raises:
            UnsupportedError: the machine runs under vfkit, or shares a folder.
            StateError: the machine is neither running nor paused.
            SpaceError: the disk has no room for the saved state.
            GuestError: the hypervisor could not save the state. After an error the machine runs or is paused as before.
            StopError: a helper could not be ended.
        """
        check_suspension(self._context.prepared)
        await self._pause.suspend(timeout_s)
        await self._life.wait_ended("the machine could not be ended cleanly")

    async def wait_closed(self) -> None:
        """Wait until the machine is closed for good; a restart after a lost network does not count."""
        await self._life.wait_closed()

    # -- what a running machine can do

    @property
    def state(self) -> VMState:
        """The state as the manager knows it; :meth:`vm_state` also queries the hypervisor."""
        return self._context.state

    @property
    def info(self) -> Info:
        """The machine's addresses, and how it runs.

        Raises:
            StateError: the machine is neither running nor paused.
        """
        session = self._context.require({VMState.RUNNING, VMState.PAUSED}, "info")
        keys = KeyPaths(self.options.ssh_key_dir)
        return Info(
            podman_socket=session.sockets.podman,
            podman_port=session.podman_port,
            ssh_port=session.ssh.port,
            ssh_key=keys.user_key,
            ssh_user="root",
            hypervisor=self._context.prepared.driver.name,
            accelerator=self._context.prepared.driver.accelerator,
            accelerator_reason=self._context.prepared.driver.accelerator_reason,
            cpus=self.options.cpus,
            memory_mib=self.options.memory_mib,
            data_disk=TargetPaths(self.options.target_dir).data_disk,
            log_dir=self.options.log_dir,
            timings=tuple(self._context.stages),
            not_resumed=self._context.not_resumed,
            health=self._context.monitor.health if self._context.monitor is not None else Health(),
        )

    async def check_health(self) -> Health:
        """Run the health check of each minute now: podman through its socket, the guest, and its disks.

        Raises:
            StateError: the machine is not running.
        """
        self._context.require_running("check_health")
        assert self._context.monitor is not None
        return (await self._context.monitor.look()).health

    async def vm_state(self) -> StateInfo:
        """Query the hypervisor for the state; return it with the operations it allows."""
        settled = {VMState.RUNNING, VMState.PAUSED, VMState.ERROR}
        state = self._context.state
        if self._context.session is not None and state in settled:
            with contextlib.suppress(GuestError):  # the hypervisor is ending; our own state changes next
                told = await self._context.session.vm.state()
                state = told if told in settled and self._context.state in settled else self._context.state
        return state_info(state)

    async def vm_pause(self) -> None:
        """Pause the virtual CPUs; do nothing if they are paused.

        Raises:
            StateError: the machine is neither running nor paused.
            GuestError: the hypervisor did not pause.
        """
        await self._pause.pause()

    async def vm_resume(self) -> None:
        """Resume the virtual CPUs and set the guest's clock; do nothing if they run.

        Also resumes a machine in Error if its hypervisor can, such as one whose disk had no room left on the host.

        Raises:
            StateError: the machine is neither running, paused nor in error.
            GuestError: the hypervisor did not resume, or the guest runs again but its clock could not be set.
        """
        await self._pause.resume()

    async def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's, verify it, and have chrony query its servers now.

        Does not wait for the servers (pool.ntp.org, time.apple.com, time.windows.com).

        Raises:
            StateError: the machine is not running.
            GuestError: the guest cannot be reached, or its clock could not be set.
        """
        return await self._pause.clocksync()

    async def export_port(
        self, host_port: int, guest_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1"
    ) -> Forward:
        """Forward a host port to a guest port; return the forward as bound.

        Args:
            host_port: The port on the host; 0 picks a free one.
            guest_port: A port of the guest; a container's published port is one too.
            protocol: ``tcp`` or ``udp``.
            address: The host address to bind; only this host can reach the default.

        Raises:
            OptionError: a port or the address is invalid.
            StateError: the machine is not running.
            PortError: the host port is taken, or needs privileges.
        """
        address = _check_forward(host_port, protocol, address, lowest=0)
        check_port("guest_port", guest_port)
        return await self._context.require_running("export_port").export(host_port, guest_port, protocol, address)

    async def unexport_port(self, host_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1") -> None:
        """Close a port that :meth:`export_port` opened.

        Raises:
            OptionError: the port or the address is invalid.
            StateError: the machine is not running.
            PortError: the port is not exported.
        """
        address = _check_forward(host_port, protocol, address, lowest=1)
        await self._context.require_running("unexport_port").unexport(host_port, protocol, address)

    def ports(self) -> tuple[Forward, ...]:
        """List the host ports open for this machine: exported ports, and published ports of containers.

        Raises:
            StateError: the machine is neither running nor paused.
        """
        return tuple(self._context.require({VMState.RUNNING, VMState.PAUSED}, "ports").forwards.values())

    async def exec(
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
        """Run a command as root in the guest. A status other than 0 is a result, not an error.

        Args:
            argv: The command and its arguments; no shell interprets them.
            stdin: The command's standard input.
            environment: Variables in addition to the guest's own.
            timeout_s: Seconds after which the command is ended; no limit by default.
            on_stdout: Called with each piece of standard output, which is then not collected.
            on_stderr: Called with each piece of standard error, which is then not collected.
            max_output_bytes: Limit in bytes for the collected output, both streams together; 64 MiB by default,
                ``None`` for no limit. Output passed to ``on_stdout`` and ``on_stderr`` does not count.

        Raises:
            OptionError: ``argv`` is not a list of strings.
            StateError: the machine is not running.
            ExecTimeout: the command ran longer than ``timeout_s``.
            GuestError: the guest cannot be reached, or the output exceeded ``max_output_bytes``; the command was
                ended.
        """
        if isinstance(argv, str) or not argv:
            raise OptionError("argv must be a list: a command and its arguments", hint='run a shell: ["sh", "-c", "…"]')
        return await self._context.require_managed("exec").ssh.exec(
            argv,
            stdin=stdin,
            environment=environment,
            timeout_s=timeout_s,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
            max_output_bytes=max_output_bytes,
        )

    @contextlib.asynccontextmanager
    async def process(
        self, argv: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> AsyncIterator[asyncssh.SSHClientProcess[bytes]]:
        """Run a command as root in the guest, with its three streams; end it on exit.

        Raises:
            StateError: the machine is not running.
            GuestError: the guest cannot be reached.
        """
        async with self._context.require_managed("process").ssh.process(argv, environment=environment) as process:
            yield process

    async def prune(self, *, everything: bool = False, volumes: bool = False) -> Pruned:
        """Remove unused data with podman, and return the freed space in ``data.img`` to the host.

        Removes stopped containers, unused pods and networks, and untagged images.

        Args:
            everything: Also remove every image that no container uses.
            volumes: Also remove volumes that no container uses, with their contents.

        Raises:
            StateError: the machine is not running.
            GuestError: the guest cannot be reached, or podman failed.
        """
        session = self._context.require_managed("prune")
        return await prune(session.sockets.podman, session.ssh, everything=everything, volumes=volumes)

    async def verify(self) -> list[FileState]:
        """Compare the machine's files with their recorded digests; the machine may be running."""
        return await verify(self.options.target_dir)

    async def reset_path(self, *, data: bool = False) -> None:
        """Restore every file of ``target_dir`` from its origin, regardless of versions.

        Args:
            data: Also delete the data disk, with every image, container and volume.

        Raises:
            StateError: the machine is not stopped.
            InUseError: another process runs the machine.
            InputError: an origin can no longer be used; nothing was changed.
            SpaceError: the disk is too small; says how much is needed.
        """
        if not self._life.is_over:
            raise StateError("the files of a running machine cannot be restored", hint="call stop() first")
        await prepare.reset(self.options, with_data=data)

    def on(self, name: EventName, listener: Listener) -> Callable[[], None]:
        """Call ``listener``, plain or async, at each event of that name; return a function that removes it.

        ``error`` passes the exception, ``health`` an :class:`ovm.Health`, the other events nothing.

        Raises:
            OptionError: the event name is unknown.
        """
        return self._events.on(name, listener)

    def events(self) -> AsyncIterator[Event]:
        """Return an iterator over every event from this call on, in order; each iterator has its own queue."""
        return self._events.stream()


def _check_forward(host_port: int, protocol: str, address: str, *, lowest: int) -> str:
    """Check a forward's host side; return the address in its canonical form."""
    check_port("host_port", host_port, lowest=lowest)
    if protocol not in {"tcp", "udp"}:
        raise OptionError(f"protocol={protocol!r} is unknown", hint="use tcp or udp")
    return check_address("address", address)
