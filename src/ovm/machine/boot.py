"""The steps of a start, in order: from nothing to a ready virtual machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ovm.errors import GuestError, HelperExited, PortError, StartError
from ovm.guest import boot_channel
from ovm.guest.bootconfig import share_tag
from ovm.guest.ssh import AGENT_SOCKET, SSH, warm_up
from ovm.host import environment
from ovm.hypervisors import Channel, Disk, Happening, Share, VMSpec, Watcher
from ovm.machine import prepare, suspend
from ovm.machine.profiles import PROFILES
from ovm.machine.running import Session, open_session
from ovm.model.options import PODMAN_PORT_FIRST, SSH_PORT_FIRST, Options
from ovm.network import forwarding, gvproxy
from ovm.paths import KeyPaths, SocketPaths, TargetPaths
from ovm.process import lock, logs, orphans
from ovm.process.child import Child, Group, process_group
from ovm.process.logcap import kept_small
from ovm.process.threads import in_thread

log = logging.getLogger(__name__)

LOCK_WAIT_S = 5.0
"""Time a start waits for the last helpers of an owner that has just ended."""
LOAD_TIMEOUT_S = 120.0
"""Enough to load gigabytes from a slow disk."""
BLAME_WAIT_S = 0.5
"""gvproxy ends with its hypervisor, and its end may be noticed first; wait to see which ended first."""

PANIC = "Kernel panic - not syncing: "
FATAL = "ovm: fatal: "
"""Prefix of the line ``CODE TEXT`` that the guest's initrd prints when it cannot boot."""
PANIC_LINES = 100
"""Lines of console to search: registers and call trace follow the reason of a panic."""

SSH_GUEST_PORT = 22
READY_VSOCK_PORT = 1026
CHANNEL_KEY_BYTES = 16

CMDLINE = (
    "quiet loglevel=4 panic=-1 cryptomgr.notests rcupdate.rcu_expedited=1 "
    "initcall_blacklist=crypto_kdf108_init,jent_mod_init,init_encrypted"
)
"""A panic resets the guest at once. The kernel skips crypto self-tests, which are for its developers, and three
initcalls: another such self-test, a source of entropy in addition to the hypervisor's, and the key type ``encrypted``,
which nothing in the guest uses."""


@contextlib.asynccontextmanager
async def power_on(
    prepared: prepare.Prepared, *, recall: suspend.Recall, step: Callable[[str], None], watcher: Watcher
) -> AsyncIterator[Session]:
    """Start the helpers and the hypervisor; the guest boots, or waits for its saved state. End them in reverse on exit.

    Args:
        prepared: The machine's options, files and driver.
        recall: The saved state to resume, if any. If it is given up, the guest boots.
        step: Called with the name of each completed step.
        watcher: Called with each report of the hypervisor.

    Raises:
        InUseError: another process owns one of the directories.
        FileError: a file of the machine, or the ssh agent to forward, is missing.
        StartError: a helper did not start.
        PortError: no port is free.
    """
    options, driver, profile = prepared.options, prepared.driver, PROFILES[prepared.options.guest]
    sockets = SocketPaths(options.socket_dir)
    async with contextlib.AsyncExitStack() as stack:
        ground = await stack.enter_async_context(_ground(prepared, sockets, recall))
        importing = asyncio.create_task(warm_up())
        stack.callback(importing.cancel)

        kept = stack.enter_context(orphans.keep(sockets.helpers))
        group = await stack.enter_async_context(
            process_group(ground.held.fds, log_path=ground.logs["guard"], spawned=kept.add)
        )
        step("guard")

        # before the guest boots: its boot configuration lists the host ports that its firewall must block
        ways = await stack.enter_async_context(_ways(group, prepared, sockets, ground, recall))
        step("network")

        # before the hypervisor starts: it connects to these sockets, and the guest may send a request at once
        channel = await stack.enter_async_context(_heard_and_told(prepared, sockets, ways, watcher))
        # the last step that can give up the saved state: from here on the hypervisor waits for it, or boots
        spec = dataclasses.replace(ground.spec, waits_for_memory=await recall.is_whole())
        vm = await stack.enter_async_context(driver.start(group, spec, logs=ground.logs, watcher=watcher))
        kept.update()
        step("hypervisor")

        session = Session(
            options=options,
            network=ways.network,
            vm=vm,
            channel=channel,
            ssh=ways.ssh,
            clock=profile.clock(ways.ssh),
            sockets=sockets,
            podman_port=ways.podman_port,
            guard=group.guard,
            helpers_changed=kept.update,
            console_log=ground.logs["console"],
            initrd_is_read=driver.reads_initrd_once,
            facts=ground.facts,
        )
        yield await stack.enter_async_context(open_session(session))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ground:
    """Resources of a start before it has a process."""

    held: lock.Lock
    agent: Path | None
    """The socket of the user's ssh agent, if the guest can use it."""
    logs: dict[str, Path]
    spec: VMSpec
    facts: dict[str, str]


@contextlib.asynccontextmanager
async def _ground(prepared: prepare.Prepared, sockets: SocketPaths, recall: suspend.Recall) -> AsyncIterator[_Ground]:
    """Lock the directories, delete sockets of an earlier start, and check whether a saved state matches."""
    options = prepared.options
    names = ["guard", "gvproxy", "console", *prepared.driver.logs(len(options.mounts))]
    async with contextlib.AsyncExitStack() as stack:
        await in_thread(partial(prepare.make_directories, options))  # a logout may have deleted the runtime directory
        # before anything is read or deleted: until the lock is held, all of it may belong to another owner
        held = await stack.enter_async_context(
            lock.hold(prepare.locked_directories(options), wait_s=LOCK_WAIT_S, helpers=sockets.helpers)
        )
        await in_thread(partial(prepare.check_files, prepared.files))
        agent = await in_thread(environment.ssh_agent) if options.ssh_agent else None
        # await the thread: it cannot be cancelled, and must not write after the next owner has taken the lock
        await in_thread(partial(_clear_sockets, sockets))
        stack.push_async_callback(in_thread, partial(_clear_sockets, sockets))
        await in_thread(partial(gvproxy.lay_out, sockets))
        log_paths = await in_thread(lambda: {name: logs.rotate(options.log_dir, name) for name in names})
        await stack.enter_async_context(kept_small(log_paths.values()))
        spec = vm_spec(prepared, sockets, log_paths["console"])
        facts = await in_thread(partial(suspend.facts, prepared, spec))
        await recall.look(TargetPaths(options.target_dir), facts)
        stack.push_async_callback(recall.close)
        yield _Ground(held=held, agent=agent, logs=log_paths, spec=spec, facts=facts)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ways:
    """Connections from the host to the guest."""

    network: forwarding.Network
    ssh: SSH
    podman_port: int | None

    @property
    def host_ports(self) -> tuple[int, ...]:
        """The host ports forwarded to sshd and podman."""
        return tuple(port for port in (self.ssh.port, self.podman_port) if port is not None)


@contextlib.asynccontextmanager
async def _ways(
    group: Group, prepared: prepare.Prepared, sockets: SocketPaths, ground: _Ground, recall: suspend.Recall
) -> AsyncIterator[_Ways]:
    """Run gvproxy, with host ports open for sshd and podman."""
    options, profile = prepared.options, PROFILES[prepared.options.guest]
    keys = KeyPaths(options.ssh_key_dir)
    starting = forwarding.start(
        group,
        prepared.files.gvproxy,
        sockets,
        ground.logs["gvproxy"],
        wire=profile.wire(prepared.driver.card),
        reads=profile.gvproxy_reads(keys),
    )
    async with starting as network:
        ssh_port, podman_port = await _open_ports(network, sockets, options, recall)
        ssh = SSH(ssh_port, keys)
        if ground.agent is not None:
            ssh.lend_socket(ground.agent, AGENT_SOCKET)
        yield _Ways(network=network, ssh=ssh, podman_port=podman_port)


@contextlib.asynccontextmanager
async def _heard_and_told(
    prepared: prepare.Prepared, sockets: SocketPaths, ways: _Ways, watcher: Watcher
) -> AsyncIterator[boot_channel.ReadyChannel]:
    """Listen to the guest, and provide the boot configuration at each of its boots."""
    options, driver = prepared.options, prepared.driver

    def was_reset() -> None:
        if not driver.tells_resets:
            watcher(Happening.REBOOTED, "")

    key = secrets.token_hex(CHANNEL_KEY_BYTES) if driver.vsock else ""
    async with boot_channel.listen(sockets.ready, log.warning, was_reset, key=key) as channel:
        telling = PROFILES[options.guest].told(
            options,
            prepared.files.initrd,
            channel_key=key,
            blocked_ports=ways.host_ports,
            asked=channel.boot_began,
        )
        async with telling:
            yield channel


def _clear_sockets(sockets: SocketPaths) -> None:
    for path in sockets.stale():
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it has another program's file in it, or does not exist
        sockets.gvproxy.rmdir()


async def _open_ports(
    network: forwarding.Network, sockets: SocketPaths, options: Options, recall: suspend.Recall
) -> tuple[int, int | None]:
    """Open the host ports of sshd and podman, before the guest boots: its firewall blocks its own access to them.

    A resumed guest blocks the old ports. If podman's port has changed, the saved state is given up. A new port of
    sshd, which requires a key, can be blocked once the guest runs.
    """
    ssh = await network.pick(SSH_GUEST_PORT, first=recall.ssh_port or SSH_PORT_FIRST)
    podman_port = await PROFILES[options.guest].open_podman(
        network, sockets, options, first=recall.podman_port or PODMAN_PORT_FIRST
    )
    if podman_port is not None and recall.podman_port not in {None, podman_port}:
        await recall.give_up(f"podman's port {recall.podman_port} is taken")
    return ssh.host_port, podman_port


def vm_spec(prepared: prepare.Prepared, sockets: SocketPaths, console_log: Path) -> VMSpec:
    """Return the specification of the virtual machine for the options."""
    options, target = prepared.options, TargetPaths(prepared.options.target_dir)
    spec = VMSpec(
        arch=prepared.driver.arch,
        cpus=options.cpus,
        memory_mib=options.memory_mib,
        kernel=prepared.files.kernel,
        initrd=sockets.boot_initrd,
        cmdline=f"{CMDLINE} {options.kernel_cmdline}".strip(),
        disks=(
            Disk(name="ovm-rootfs", path=prepared.files.rootfs, read_only=True),
            Disk(name="ovm-data", path=target.data_disk),
        ),
        shares=tuple(
            Share(
                tag=share_tag(number),
                host_path=mount.host_path,
                read_only=mount.read_only,
                socket=sockets.share(number),
            )
            for number, mount in enumerate(options.mounts)
        ),
        channels=(Channel(name="ovm.ready", vsock_port=READY_VSOCK_PORT, socket=sockets.ready),),
        network_socket=sockets.network_card,
        mac=gvproxy.GUEST_MAC,
        console_log=console_log,
        control_socket=sockets.control,
        rosetta=options.rosetta,
    )
    return PROFILES[options.guest].fit(spec, prepared.files.initrd, target, sockets)


async def come_up(session: Session, *, step: Callable[[str], None]) -> None:
    """Wait until a booting guest is ready, and record that its data disk was in use.

    Raises:
        GuestRefused: the guest reports that it cannot boot.
        GuestError: the guest reported that it is ready, but cannot be reached.
    """
    await session.channel.wait()
    step("guest")
    if session.profile.engine:
        await session.attach()
    await in_thread(partial(prepare.remember_ready, session.options))
    await _be_ready(session)
    step("ready")


async def go_on(session: Session, recall: suspend.Recall, *, step: Callable[[str], None]) -> list[PortError]:
    """Resume a guest from its saved state, set its clock, and open its ports.

    Returns the ports that could not be opened again.

    Raises:
        OVMError: the saved state cannot be loaded, or the guest cannot be reached.
    """
    await recall.load(session, timeout_s=LOAD_TIMEOUT_S)
    step("memory")
    await session.vm.resume()
    step("guest")
    async with asyncio.TaskGroup() as tasks:
        opening = tasks.create_task(session.open_again(recall.forwards))
        if session.profile.engine:
            tasks.create_task(session.reach_again(known_ssh_port=recall.ssh_port))
    await _be_ready(session)
    step("ready")
    return opening.result()


async def _be_ready(session: Session) -> None:
    session.console_read = (await in_thread(session.console_log.stat)).st_size
    if session.initrd_is_read:
        await in_thread(partial(session.sockets.boot_initrd.unlink, missing_ok=True))


async def boot_error(session: Session, message: str) -> StartError:
    """Return the error for a guest that failed to boot, with the end of its console."""
    console = await in_thread(partial(logs.tail, session.console_log, PANIC_LINES))
    for line in console:  # before its vsock works, a guest can report an error only on the console
        if FATAL in line:
            return boot_channel.refusal(*line.partition(FATAL)[2].partition(" ")[::2])
    panics = [line.partition(PANIC)[2] for line in console if PANIC in line]
    return StartError(
        f"{message}: kernel panic, {panics[-1]}" if panics else message,
        stage="boot",
        log_tail=console[-logs.TAIL_LINES :],
        hint=f"read the guest's console in {session.console_log}",
    )


async def halt_error(session: Session, what: Happening, words: str) -> StartError:
    """Return the error for a guest that its hypervisor stopped before it was ready, with the hypervisor's log."""
    log_path = session.vm.child.log_path
    return StartError(
        f"the hypervisor stopped the guest before it was ready: {words}",
        stage="boot",
        log_tail=await in_thread(partial(logs.tail, log_path)) if log_path else (),
        hint="make room on the host's disk, then start the machine again"
        if what is Happening.OUT_OF_SPACE
        else f"read the hypervisor's log: {log_path}",
    )


async def explain(
    session: Session, noticed: HelperExited, powered_off: Callable[[Child], Awaitable[bool]]
) -> StartError:
    """Return the cause of a helper's end during the boot: hypervisor and gvproxy end with the guest.

    Raises:
        GuestRefused: the guest has reported why.
    """
    await session.channel.last_words()
    vm = session.vm.child
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BLAME_WAIT_S):
            await vm.wait()
    if vm.running:
        return noticed
    if await powered_off(vm):
        return await boot_error(session, "the guest powered itself off before it was ready")
    return await vm.exited("boot")


async def find_panic(session: Session) -> GuestError | None:
    """Return the panic on the guest's console since it was last ready; ``None`` if there is none."""
    console = await in_thread(partial(logs.tail, session.console_log, PANIC_LINES, since=session.console_read))
    panics = [number for number, line in enumerate(console) if PANIC in line]
    if not panics:
        return None
    first = panics[0]
    return GuestError(
        f"the guest's kernel panicked; the guest reboots: {console[first].partition(PANIC)[2]}",
        log_tail=tuple(console[first : first + logs.TAIL_LINES]),
        hint=f"read the guest's console in {session.console_log}; containers with a restart policy start again",
    )


async def blame(session: Session, noticed: Child) -> Child:
    """Return the helper whose end ended the machine: gvproxy ends with the hypervisor, all end with the guard."""
    vm, guard = session.vm.child, session.guard
    if guard.running and not noticed.was_killed:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BLAME_WAIT_S):
                await vm.wait()
    return next((child for child in (guard, vm) if not child.running), noticed)
