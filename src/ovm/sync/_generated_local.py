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
    """A virtual machine that runs Podman. Made by :func:`ovm.sync.create_linux_ovm` or :func:`ovm.sync.create_ovm`.

    ``with machine:`` starts it and stops it. One object can be started and stopped any number of times, from any
    thread; if the interpreter exits while it runs, the guest is shut down first.
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
        self._loop.run(self._async.start, resume=resume, timeout_s=timeout_s, progress=progress)

    def stop(
        self, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S, progress: Callable[[str], object] | None = None
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
        self._loop.run(self._async.stop, force=force, timeout_s=timeout_s, progress=progress)

    def suspend(self, *, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
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
        self._loop.run(self._async.suspend, timeout_s=timeout_s)

    def wait_closed(self) -> None:
        """Until it is down for good, and not only to be started again because its network was lost."""
        self._loop.run(self._async.wait_closed)

    @property
    def state(self) -> VMState:
        """The state as the manager knows it; :meth:`vm_state` asks the hypervisor too."""
        return self._loop.call(lambda: self._async.state)

    @property
    def info(self) -> Info:
        """Where the machine can be reached.

        Raises:
            StateError: it is neither running nor paused.
        """
        return self._loop.call(lambda: self._async.info)

    def check_health(self) -> Health:
        """Look now at what is looked at each minute: podman by way of its socket, the guest, and its disks.

        Raises:
            StateError: it is not running.
        """
        return self._loop.run(self._async.check_health)

    def vm_state(self) -> StateInfo:
        """The state, as the hypervisor tells it now, and what can be asked of the machine."""
        return self._loop.run(self._async.vm_state)

    def vm_pause(self) -> None:
        """Pause the virtual CPUs; fine if they are paused.

        Raises:
            StateError: it is neither running nor paused.
            GuestError: the hypervisor did not do as asked.
        """
        self._loop.run(self._async.vm_pause)

    def vm_resume(self) -> None:
        """Let the virtual CPUs run again, and set the guest's clock; fine if they run.

        A machine in Error goes on too if its hypervisor can: one whose disk had no room left on the host, for one.

        Raises:
            StateError: it is neither running, paused nor in error.
            GuestError: the hypervisor did not do as asked, or it runs again, but its clock could not be set.
        """
        self._loop.run(self._async.vm_resume)

    def clocksync(self) -> ClockSync:
        """Set the guest's clock to the host's, verify it, and have chrony look at its servers now.

        The servers (pool.ntp.org, time.apple.com, time.windows.com) are not waited for.

        Raises:
            StateError: it is not running.
            GuestError: the guest cannot be reached, or its clock does not obey.
        """
        return self._loop.run(self._async.clocksync)

    def export_port(
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
        return self._loop.run(self._async.export_port, host_port, guest_port, protocol=protocol, address=address)

    def unexport_port(self, host_port: int, *, protocol: Protocol = "tcp", address: str = "127.0.0.1") -> None:
        """Close what :meth:`export_port` opened.

        Raises:
            OptionError: the port or the address is none.
            StateError: it is not running.
            PortError: it was not exported.
        """
        self._loop.run(self._async.unexport_port, host_port, protocol=protocol, address=address)

    def ports(self) -> tuple[Forward, ...]:
        """What is open on the host for this machine: exported ports, and those of containers.

        Raises:
            StateError: it is not running.
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
        """Have podman remove what nothing uses, and give the host back the room that frees in ``data.img``.

        Containers that do not run, pods and networks nobody is in, and images without a name go.

        Args:
            everything: Every image that no container uses goes too.
            volumes: So do volumes that no container uses, with what is in them.

        Raises:
            StateError: it is not running.
            GuestError: the guest cannot be reached, or podman did not do it.
        """
        return self._loop.run(self._async.prune, everything=everything, volumes=volumes)

    def verify(self) -> list[FileState]:
        """Compare the files it runs from with the digests they had when they were made; it may be running."""
        return self._loop.run(self._async.verify)

    def reset_path(self, *, data: bool = False) -> None:
        """Restore every file of ``target_dir`` from its origin, whatever the versions say.

        Args:
            data: Remove the data disk too, and with it every image, container and volume.

        Raises:
            StateError: it is not stopped.
            InUseError: another process runs it.
            InputError: an origin cannot be used any more; nothing was changed.
            SpaceError: the disk is too small; says what is needed.
        """
        self._loop.run(self._async.reset_path, data=data)


def create_ovm(
    name: str = DEFAULT_MACHINE, *, image: Path | str | None = None, progress: Progress | None = None, **options: Any
) -> OVM:
    """The machine called ``name``, with a default for everything: the guest image, the helpers and the directories.

    Nothing is started. ``options`` are those of :class:`ovm.Options`; podman's API is not on a TCP port unless
    ``podman_tcp=True`` asks for it.

    Args:
        name: Machines of different names share the image and nothing else.
        image: The directory of a guest image; the default image of this host's architecture if not given.
        progress: Called with a file's name, the bytes done and the bytes in all while files are copied.
        **options: Anything of :class:`ovm.Options` except the origin's files and their versions.

    Raises:
        OptionError: the name or an option cannot be used.
        ImageError: there is no guest image; build one with ``ovm image build``.
        HelperError: gvproxy or the hypervisor (QEMU on Linux, vfkit on macOS) is missing.
        UntrustedError: another user made a directory of the machine or of the images, or could change it.
        UnsupportedError: machines do not run on this system.
    """
    loop = Loop.current()
    return OVM(loop, loop.run(create_ovm_async, name, image=image, progress=progress, **options))


def create_linux_ovm(
    options: Options | Mapping[str, Any] | None = None, /, *, progress: prepare.Progress | None = None, **more: Any
) -> OVM:
    """A machine under QEMU: inputs checked, files copied or unpacked, keys made. Nothing is started yet.

    Args:
        options: :class:`ovm.Options`, or a mapping with its names or the seed's camelCase ones.
        progress: Called with a file's name, the bytes done and the bytes in all while files are copied.
        **more: Options by keyword, on top of ``options``.

    Raises:
        InputError: something given cannot be used; nothing was touched.
        InUseError: another process owns one of the directories.
        SpaceError: the disk is too small; says what is needed.
    """
    loop = Loop.current()
    return OVM(loop, loop.run(create_linux_ovm_async, options, progress=progress, **more))


def create_darwin_ovm(
    options: Options | Mapping[str, Any] | None = None, /, *, progress: prepare.Progress | None = None, **more: Any
) -> OVM:
    """A machine under vfkit: inputs checked, files copied or unpacked, keys made. Nothing is started yet.

    ``gvproxy`` and ``vfkit`` are those of ``origin_path``, else the ones that are installed. /Users, /var/folders
    and /private are shared unless ``mounts`` says otherwise.

    Args:
        options: :class:`ovm.Options`, or a mapping with its names or the seed's camelCase ones.
        progress: Called with a file's name, the bytes done and the bytes in all while files are copied.
        **more: Options by keyword, on top of ``options``.

    Raises:
        InputError: something given cannot be used, a path that vfkit's command line cannot carry for one; nothing
            was touched.
        InUseError: another process owns one of the directories.
        SpaceError: the disk is too small; says what is needed.
    """
    loop = Loop.current()
    return OVM(loop, loop.run(create_darwin_ovm_async, options, progress=progress, **more))
