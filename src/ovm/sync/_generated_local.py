"""A blocking machine. Written by scripts/sync.py; what it cannot know is in base.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovm.disks.verify import FileState
from ovm.guest.ssh import COLLECTED_MAX_BYTES
from ovm.machine import prepare
from ovm.machine.create import create_darwin_ovm as create_darwin_ovm_async
from ovm.machine.create import create_linux_ovm as create_linux_ovm_async
from ovm.machine.prepare import Progress
from ovm.machine.vm import READY_TIMEOUT_S
from ovm.model.defaults import STOP_TIMEOUT_S, SUSPEND_TIMEOUT_S
from ovm.model.info import Health, Info
from ovm.model.options import Options
from ovm.model.ports import Forward, Protocol
from ovm.model.results import ClockSync, ExecResult, Pruned
from ovm.model.states import StateInfo, VMState
from ovm.registry.create import create_ovm as create_ovm_async
from ovm.registry.machines import DEFAULT_MACHINE
from ovm.sync.base import Local
from ovm.sync.loop import Loop


class OVM(Local):
    """A virtual machine that runs Podman, created by :func:`ovm.sync.create_linux_ovm` or :func:`ovm.sync.create_ovm`.

    ``with machine:`` starts and stops it. One object can be started and stopped any number of times, from any thread.
    If the interpreter exits while the machine runs, the guest is shut down first.
    """

    def start(
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
        self._loop.run(self._async.start, resume=resume, timeout_s=timeout_s, progress=progress)

    def stop(
        self, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S, progress: Callable[[str], object] | None = None
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
        self._loop.run(self._async.stop, force=force, timeout_s=timeout_s, progress=progress)

    def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
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
        self._loop.run(self._async.suspend, timeout_s=timeout_s)

    def wait_closed(self) -> None:
        """Wait until the machine is closed for good; a restart after a lost network does not count."""
        self._loop.run(self._async.wait_closed)

    @property
    def state(self) -> VMState:
        """The state as the manager knows it; :meth:`vm_state` also queries the hypervisor."""
        return self._loop.call(lambda: self._async.state)

    @property
    def info(self) -> Info:
        """The machine's addresses, and how it runs.

        Raises:
            StateError: the machine is neither running nor paused.
        """
        return self._loop.call(lambda: self._async.info)

    def check_health(self) -> Health:
        """Run the health check of each minute now: podman through its socket, the guest, and its disks.

        Raises:
            StateError: the machine is not running.
        """
        return self._loop.run(self._async.check_health)

    def vm_state(self) -> StateInfo:
        """Query the hypervisor for the state; return it with the operations it allows."""
        return self._loop.run(self._async.vm_state)

    def vm_pause(self) -> None:
        """Pause the virtual CPUs; do nothing if they are paused.

        Raises:
            StateError: the machine is neither running nor paused.
            GuestError: the hypervisor did not pause.
        """
        self._loop.run(self._async.vm_pause)

    def vm_resume(self) -> None:
        """Resume the virtual CPUs and set the guest's clock; do nothing if they run.

        Also resumes a machine in Error if its hypervisor can, such as one whose disk had no room left on the host.

        Raises:
            StateError: the machine is neither running, paused nor in error.
            GuestError: the hypervisor did not resume, or the guest runs again but its clock could not be set.
        """
        self._loop.run(self._async.vm_resume)

    def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's, verify it, and have chrony query its servers now.

        Does not wait for the servers (pool.ntp.org, time.apple.com, time.windows.com).

        Raises:
            StateError: the machine is not running.
            GuestError: the guest cannot be reached, or its clock could not be set.
        """
        return self._loop.run(self._async.clocksync)

    def export_port(
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
        return self._loop.run(self._async.export_port, host_port, guest_port, protocol=protocol, address=address)

    def unexport_port(self, host_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1") -> None:
        """Close a port that :meth:`export_port` opened.

        Raises:
            OptionError: the port or the address is invalid.
            StateError: the machine is not running.
            PortError: the port is not exported.
        """
        self._loop.run(self._async.unexport_port, host_port, protocol=protocol, address=address)

    def ports(self) -> tuple[Forward, ...]:
        """List the host ports open for this machine: exported ports, and published ports of containers.

        Raises:
            StateError: the machine is neither running nor paused.
        """
        return self._loop.call(self._async.ports)

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
        """Remove unused data with podman, and return the freed space in ``data.img`` to the host.

        Removes stopped containers, unused pods and networks, and untagged images.

        Args:
            everything: Also remove every image that no container uses.
            volumes: Also remove volumes that no container uses, with their contents.

        Raises:
            StateError: the machine is not running.
            GuestError: the guest cannot be reached, or podman failed.
        """
        return self._loop.run(self._async.prune, everything=everything, volumes=volumes)

    def verify(self) -> list[FileState]:
        """Compare the machine's files with their recorded digests; the machine may be running."""
        return self._loop.run(self._async.verify)

    def reset_path(self, *, data: bool = False) -> None:
        """Restore every file of ``target_dir`` from its origin, regardless of versions.

        Args:
            data: Also delete the data disk, with every image, container and volume.

        Raises:
            StateError: the machine is not stopped.
            InUseError: another process runs the machine.
            InputError: an origin can no longer be used; nothing was changed.
            SpaceError: the disk is too small; says how much is needed.
        """
        self._loop.run(self._async.reset_path, data=data)


def create_ovm(
    name: str = DEFAULT_MACHINE, *, image: Path | str | None = None, progress: Progress | None = None, **options: Any
) -> OVM:
    """Create the machine ``name``, with defaults for the guest image, the helper programs and the directories.

    The machine is not started. ``options`` are those of :class:`ovm.Options`; podman's API has a TCP port only with
    ``podman_tcp=True``.

    Args:
        name: Name of the machine. Machines of different names share only the image.
        image: Directory of a guest image; default: the default image of this host's architecture.
        progress: Called with the file's name, the bytes copied and the total bytes while files are copied.
        **options: Options of :class:`ovm.Options` except the origin files and their versions.

    Raises:
        OptionError: the name or an option is invalid.
        ImageError: the guest image is missing or damaged; build one with ``ovm image build``.
        HelperError: gvproxy or the hypervisor (QEMU on Linux, vfkit on macOS) is missing.
        UntrustedError: another user created a directory of the machine or of the images, or could change it.
        UnsupportedError: machines do not run on this system.
    """
    loop = Loop.current()
    return OVM(loop, loop.run(create_ovm_async, name, image=image, progress=progress, **options))


def create_linux_ovm(
    options: Options | Mapping[str, Any] | None = None, /, *, progress: prepare.Progress | None = None, **more: Any
) -> OVM:
    """Create a machine under QEMU: check inputs, copy or unpack files, create keys. This starts nothing.

    Args:
        options: :class:`ovm.Options`, or a mapping with its names or the seed's camelCase ones.
        progress: Called with a file's name, the bytes done and the total bytes while files are copied.
        **more: Options by keyword; they override ``options``.

    Raises:
        InputError: an option or file cannot be used; nothing was changed.
        InUseError: another process owns one of the directories.
        SpaceError: the disk is too small; says how much is needed.
    """
    loop = Loop.current()
    return OVM(loop, loop.run(create_linux_ovm_async, options, progress=progress, **more))


def create_darwin_ovm(
    options: Options | Mapping[str, Any] | None = None, /, *, progress: prepare.Progress | None = None, **more: Any
) -> OVM:
    """Create a machine under vfkit: check inputs, copy or unpack files, create keys. This starts nothing.

    ``gvproxy`` and ``vfkit`` default to the installed ones, ``mounts`` to /Users, /var/folders and /private.

    Args:
        options: :class:`ovm.Options`, or a mapping with its names or the seed's camelCase ones.
        progress: Called with a file's name, the bytes done and the total bytes while files are copied.
        **more: Options by keyword; they override ``options``.

    Raises:
        InputError: an option or file cannot be used, such as a path that vfkit's command line cannot express;
            nothing was changed.
        InUseError: another process owns one of the directories.
        SpaceError: the disk is too small; says how much is needed.
    """
    loop = Loop.current()
    return OVM(loop, loop.run(create_darwin_ovm_async, options, progress=progress, **more))
