"""A machine, as people use it."""

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
"""From the hypervisor's start to the guest's ready; emulated guests on busy machines are slow."""


class OVM:
    """A virtual machine that runs Podman. Made by :func:`ovm.create_linux_ovm` or :func:`ovm.create_ovm`.

    ``async with machine:`` starts it and stops it. One object can be started and stopped any number of times; it
    belongs to the event loop that started it, and if that loop ends, the guest is shut down with it.
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
        why. Cancelling it leaves nothing behind, nor does a failure.

        Args:
            resume: Whether to resume a saved state; if not, it is deleted.
            timeout_s: Seconds the guest may take from the hypervisor's start to its ready.
            progress: Called with each stage as it is done, by the names that are in ``info.timings``.

        Raises:
            StateError: it is not stopped.
            InUseError: another process owns one of the directories.
            FileError: a file or directory of it is not there any more or cannot be used.
            HelperError: a helper cannot be executed.
            PortError: no port is to be had for ssh or podman.
            StartError: it did not come up; says at which stage, how a helper ended, and its last words.
            GuestError: the guest said it was ready, but cannot be reached.
        """
        await self._life.start(resume=resume, timeout_s=timeout_s, progress=progress)

    async def stop(
        self,
        *,
        force: bool = False,
        timeout_s: float = STOP_TIMEOUT_S,
        progress: Callable[[str], object] | None = None,
    ) -> None:
        """Shut the guest down and end every helper; fine if it is stopped.

        The guest is asked to power off, then its power button is pressed; when ``timeout_s`` seconds are over, or if
        it cannot be asked at all, its power is cut. A second stop joins the first (and may force it), a stop during a
        start cancels the start. Once begun it is finished, even if the caller is cancelled.

        Args:
            force: Cut the power at once, which is a power failure to the guest: what was not flushed is lost.
            timeout_s: Seconds the guest may take to shut down; those of the first of several stops count.
            progress: Called with each step, in words for people.

        Raises:
            OptionError: ``timeout_s`` is negative.
            StopError: a helper could not be ended.
        """
        if timeout_s < 0:
            raise OptionError(f"timeout_s={timeout_s!r} is negative")
        await self._life.stop(force=force, timeout_s=timeout_s, progress=progress)

    async def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
        """Save the guest's state to disk and end every process; the next :meth:`start` resumes it.

        Containers go on where they were; who was connected to one has to connect again. A paused machine runs after
        that start. The memory goes with this machine as it is, and is removed by the next start in any case: if files,
        options, QEMU or the data disk have changed meanwhile, the guest boots, as after a power failure. What it had
        written by now is synced first. It takes up to ``memory_mib`` of disk.

        Once begun it is finished, even if the caller is cancelled; a :meth:`stop` meanwhile wins.

        Args:
            timeout_s: Seconds the hypervisor may take.

        Raises:
            UnsupportedError: it runs under vfkit, or shares a folder.
            StateError: it is neither running nor paused.
            SpaceError: the disk has no room for the memory.
            GuestError: the hypervisor could not do it. After an error the machine does what it did before.
            StopError: a helper could not be ended.
        """
        check_suspension(self._context.prepared)
        await self._pause.suspend(timeout_s)
        await self._life.wait_ended("the machine could not be ended cleanly")

    async def wait_closed(self) -> None:
        """Until it is down for good, and not only to be started again because its network was lost."""
        await self._life.wait_closed()

    # -- what a running machine can do

    @property
    def state(self) -> VMState:
        """The state as the manager knows it; :meth:`vm_state` asks the hypervisor too."""
        return self._context.state

    @property
    def info(self) -> Info:
        """Where the machine can be reached.

        Raises:
            StateError: it is neither running nor paused.
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
        """Look now at what is looked at each minute: podman by way of its socket, the guest, and its disks.

        Raises:
            StateError: it is not running.
        """
        self._context.require_running("check_health")
        assert self._context.monitor is not None
        return (await self._context.monitor.look()).health

    async def vm_state(self) -> StateInfo:
        """The state, as the hypervisor tells it now, and what can be asked of the machine."""
        settled = {VMState.RUNNING, VMState.PAUSED, VMState.ERROR}
        state = self._context.state
        if self._context.session is not None and state in settled:
            with contextlib.suppress(GuestError):  # it is ending this very moment: ours will say so next
                told = await self._context.session.vm.state()
                state = told if told in settled and self._context.state in settled else self._context.state
        return state_info(state)

    async def vm_pause(self) -> None:
        """Pause the virtual CPUs; fine if they are paused.

        Raises:
            StateError: it is neither running nor paused.
            GuestError: the hypervisor did not do as asked.
        """
        await self._pause.pause()

    async def vm_resume(self) -> None:
        """Let the virtual CPUs run again, and set the guest's clock; fine if they run.

        A machine in Error goes on too if its hypervisor can: one whose disk had no room left on the host, for one.

        Raises:
            StateError: it is neither running, paused nor in error.
            GuestError: the hypervisor did not do as asked, or it runs again, but its clock could not be set.
        """
        await self._pause.resume()

    async def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's, verify it, and have chrony look at its servers now.

        The servers (pool.ntp.org, time.apple.com, time.windows.com) are not waited for.

        Raises:
            StateError: it is not running.
            GuestError: the guest cannot be reached, or its clock does not obey.
        """
        return await self._pause.clocksync()

    async def export_port(
        self, host_port: int, guest_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1"
    ) -> Forward:
        """Lead a port of the host to a port of the guest; returns what was bound.

        Args:
            host_port: 0 picks a free one.
            guest_port: A port of the guest, which a container's published port is too.
            protocol: ``tcp`` or ``udp``.
            address: Which of the host's addresses to bind; this host alone can reach the default.

        Raises:
            OptionError: a port or the address is none.
            StateError: it is not running.
            PortError: the host port is taken, or needs privileges.
        """
        address = _check_forward(host_port, protocol, address, lowest=0)
        check_port("guest_port", guest_port)
        return await self._context.require_running("export_port").export(host_port, guest_port, protocol, address)

    async def unexport_port(self, host_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1") -> None:
        """Close what :meth:`export_port` opened.

        Raises:
            OptionError: the port or the address is none.
            StateError: it is not running.
            PortError: it was not exported.
        """
        address = _check_forward(host_port, protocol, address, lowest=1)
        await self._context.require_running("unexport_port").unexport(host_port, protocol, address)

    def ports(self) -> tuple[Forward, ...]:
        """What is open on the host for this machine: exported ports, and those of containers.

        Raises:
            StateError: it is not running.
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
            argv: The command and its arguments; no shell comes between.
            stdin: What it reads.
            environment: Variables besides the guest's own.
            timeout_s: Seconds after which it is ended; no limit by default.
            on_stdout: Gets standard output piece by piece, which is then not collected.
            on_stderr: Likewise for standard error.
            max_output_bytes: How much is collected of both outputs together, in bytes; 64 MiB by default, ``None`` for
                no limit. What ``on_stdout`` and ``on_stderr`` get does not count.

        Raises:
            OptionError: ``argv`` is no list of words.
            StateError: it is not running.
            ExecTimeout: it ran too long.
            GuestError: the guest cannot be reached, or the output was longer than ``max_output_bytes``; the command has
                been ended.
        """
        if isinstance(argv, str) or not argv:
            raise OptionError("argv is the list of a command and its arguments", hint='for a shell: ["sh", "-c", "…"]')
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
        """A command running as root in the guest, with its three streams; ended on the way out.

        Raises:
            StateError: it is not running.
            GuestError: the guest cannot be reached.
        """
        async with self._context.require_managed("process").ssh.process(argv, environment=environment) as process:
            yield process

    async def prune(self, *, everything: bool = False, volumes: bool = False) -> Pruned:
        """Have podman remove what nothing uses, and give the host back the room that frees in ``data.img``.

        Containers that do not run, pods and networks nobody is in, and images without a name go.

        Args:
            everything: Every image that no container uses goes too.
            volumes: So do volumes that no container uses, with what is in them.

        Raises:
            StateError: it is not running.
            GuestError: the guest cannot be reached, or podman did not do it.
        """
        session = self._context.require_managed("prune")
        return await prune(session.sockets.podman, session.ssh, everything=everything, volumes=volumes)

    async def verify(self) -> list[FileState]:
        """Compare the files it runs from with the digests they had when they were made; it may be running."""
        return await verify(self.options.target_dir)

    async def reset_path(self, *, data: bool = False) -> None:
        """Restore every file of ``target_dir`` from its origin, whatever the versions say.

        Args:
            data: Remove the data disk too, and with it every image, container and volume.

        Raises:
            StateError: it is not stopped.
            InUseError: another process runs it.
            InputError: an origin cannot be used any more; nothing was changed.
            SpaceError: the disk is too small; says what is needed.
        """
        if not self._life.is_over:
            raise StateError("the files of a running machine cannot be restored", hint="stop() it first")
        await prepare.reset(self.options, with_data=data)

    def on(self, name: EventName, listener: Listener) -> Callable[[], None]:
        """Call ``listener``, plain or async, at each event of that name; returns what removes it again.

        ``ready``, ``close``, ``vmPause`` and ``vmResume`` pass nothing, ``error`` passes the exception, ``health`` an
        :class:`ovm.Health`.

        Raises:
            OptionError: there is no event of that name.
        """
        return self._events.on(name, listener)

    def events(self) -> AsyncIterator[Event]:
        """Every event from this call on, in order; each iterator has a queue of its own."""
        return self._events.stream()


def _check_forward(host_port: int, protocol: str, address: str, *, lowest: int) -> str:
    """The address in its one spelling."""
    check_port("host_port", host_port, lowest=lowest)
    if protocol not in {"tcp", "udp"}:
        raise OptionError(f"protocol={protocol!r} is unknown", hint="tcp or udp")
    return check_address("address", address)
