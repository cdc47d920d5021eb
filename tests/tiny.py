"""The tiny guest: the full guest's kernel and initrd with another ``/init``, up in about a second.

What it does is ordered by words on its kernel command line, ``tiny.WORD`` or ``tiny.WORD=VALUE``, and while it runs by
lines of shell sent to its port 22 (:func:`tell`), which the manager forwards as ``info.ssh_port``. Its words go to the
virtio-serial port ``ovm.ready``, or where there is none to the host's vsock port 1026, one connection each.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import functools
import json
import lzma
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import guests
import ovm
import processes
import under
from ovm.guest import bootconfig
from ovm.model.events import EVENT_NAMES
from processes import holders

MODULES = {"button": "acpi", "evdev": "input"}
"""What hears the power button and who tells, by their directory below kernel/drivers; the initrd lacks them."""

INIT = r"""#!/bin/sh
# Words: never fatal=CODE deaf panic reset off warn=TEXT hostile tick
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
exec </dev/null >/dev/console 2>&1
read -r cmdline </proc/cmdline
while read -r m; do insmod "/modules/$m"; done </modules/virtio
for p in /sys/class/virtio-ports/*; do
    [ -e "$p/name" ] && read -r name <"$p/name" && [ "$name" = ovm.ready ] && port=/dev/${p##*/}
done
[ -n "$port" ] || while read -r m; do insmod "/modules/$m"; done </modules/vsock
tell() { # standard input to the host
    if [ -n "$port" ]; then cat >"$port"; else
        { [ ! -s /ovm/channel-key ] || printf 'key %s\n' "$(cat /ovm/channel-key)"; cat; } | vsock 1026
    fi
}
say() { printf '%b\n' "$*" | tell; }
stage() { read -r up _ </proc/uptime; say stage "$1" "$up"; }
word() { # NAME: whether it was ordered; its value is then in $value
    case " $cmdline " in
    *" tiny.$1 "*) value= ;;
    *" tiny.$1="*) value=${cmdline##* tiny.$1=} value=${value%% *} ;;
    *) return 1 ;;
    esac
}
# what a test asks of one boot only: a word on the first sector of the data disk
order=$(dd if=/dev/vdb bs=16 count=1 2>/dev/null | tr -d '\0')
[ -z "$order" ] || { dd if=/dev/zero of=/dev/vdb bs=16 count=1; busybox sync; } 2>/dev/null
echo "tiny: booted"

[ "$order" != fall ] || echo c >/proc/sysrq-trigger
[ "$order" != hang ] || while :; do sleep 1000; done
stage initrd
! word warn || say warn "$value"
! word panic || echo c >/proc/sysrq-trigger
[ "$order" != panic ] || echo c >/proc/sysrq-trigger
! word reset || busybox reboot -f
! word off || poweroff -f
! word fatal || { say fatal "$value" tiny cannot go on; poweroff -f; }
if word hostile; then
    say ''; say 'nonsense'; say 'ready'; say 'ready soon'; say 'ready 1 2 \0377\0376 \033[2J'; say 'stage x'
    i=0; while [ $i -lt 200 ]; do say stage "s$i" 1; i=$((i + 1)); done
    busybox yes 'a line that does not end' | busybox head -c 100000 | tr -d '\n' | tell; say ''
    say warn "$(busybox yes w | busybox head -n 300 | tr -d '\n')"
fi

for n in /sys/class/net/*; do
    [ -e "$n/device" ] || continue
    ip link set "${n##*/}" up
    ip addr add 192.168.127.2/24 dev "${n##*/}"
    ip route add default via 192.168.127.1
done
busybox nc -ll -p 22 -e sh &
! word tick || (while :; do echo tick; sleep 0.1; done) &
insmod /modules/button.ko && insmod /modules/evdev.ko
button=
until [ -n "$button" ]; do
    for e in /sys/class/input/event*; do
        [ -e "$e/device/name" ] && read -r name <"$e/device/name" || continue
        [ "$name" != "Power Button" ] || button=/dev/input/${e##*/}
    done
done
exec 4<"$button" # a press that comes before this is lost
word never || { read -r up _ </proc/uptime; say ready "$up"; }
while dd of=/dev/null bs=24 count=1 <&4 2>/dev/null; do
    echo "tiny: the power button was pressed"
    word deaf || poweroff -f
done
"""


@dataclass(frozen=True, slots=True)
class Guest:
    """Files of the guest, as ``origin_path`` wants them."""

    kernel: Path
    initrd: Path
    rootfs: Path


def build(image: Path, directory: Path) -> Guest:
    """The tiny guest made from the full image in ``image``."""
    initrd = guests.made("tiny.initrd", of=image) or _initrd(image, directory)
    rootfs = directory / "tiny.rootfs"
    rootfs.write_bytes(b"tiny" * 128)
    return Guest(kernel=image / "kernel", initrd=initrd, rootfs=rootfs)


def _initrd(image: Path, directory: Path) -> Path:
    files = {"init": (0o100755, INIT.encode()), "bin/vsock": (0o100755, vsock(directory).read_bytes())}
    for name, content in _modules(image / "rootfs.btrfs").items():
        files[f"modules/{name}.ko"] = (0o100644, content)
    content = bootconfig._padded((image / "initrd").read_bytes())
    content += archive(files)
    initrd = directory / "tiny.initrd"
    initrd.write_bytes(content)
    return initrd


def archive(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A cpio of ``files``, mode and content by path, and of the directories they are in."""
    entries = {parent: (0o040755, b"") for name in sorted(files) for parent in reversed([*bootconfig._parents(name)])}
    entries |= files
    packed = (bootconfig._entry(inode, name, *entry) for inode, (name, entry) in enumerate(entries.items(), start=1))
    return b"".join(packed) + bootconfig._entry(0, "TRAILER!!!", 0, b"")


def vsock(directory: Path) -> Path:
    """The guests' own client of the host's vsock ports, built into ``directory``; busybox has none."""
    program, source = directory / "vsock", Path(__file__).parent / "guest" / "vsock.c"
    subprocess.run(["cc", "-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program


def _modules(rootfs: Path) -> Mapping[str, bytes]:
    """Kernel modules out of a btrfs image, for which neither a mount nor root is needed."""
    leaves = "|".join(f"/{where}(|/{name}[.]ko.*)" for name, where in MODULES.items())
    regex = f"^/(|usr(|/lib(|/modules(|/[^/]*(|/kernel(|/drivers(|{leaves})))))))$"
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        command = ["btrfs", "restore", "--path-regex", regex, rootfs, directory]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for name in MODULES:
            files = list(Path(directory).rglob(f"{name}.ko*"))
            assert files, f"{rootfs} has no {name}.ko below /usr/lib/modules: {done.stderr}"
            content = files[0].read_bytes()
            found[name] = lzma.decompress(content) if files[0].suffix == ".xz" else content
    return found


async def tell(port: int, line: str, *, timeout_s: float = 60.0) -> str:
    """Have a shell of the guest do ``line``; returns what it printed. Tries until the guest listens."""
    async with asyncio.timeout(timeout_s):
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"{line}\necho; echo done\nexit\n".encode())
                answer = (await reader.read()).decode()
            except ConnectionError:
                answer = ""
            finally:
                writer.close()
            if answer.endswith("done\n"):
                return answer.removesuffix("\ndone\n")
            await asyncio.sleep(0.05)


async def order(port: int, line: str) -> None:
    """As :func:`tell`, for what the guest does not live to answer; it is done a moment after the connection ends."""
    await tell(port, f"(sleep 0.1; {line}) </dev/null >/dev/null 2>&1 &")


class Machines:
    """Makes tiny machines below one directory, records what they tell, and sees what they leave."""

    def __init__(self, guest: Guest, gvproxy: Path, root: Path, vfkit: Path | None = None) -> None:
        self.guest, self.gvproxy, self.root, self.vfkit = guest, gvproxy, root, vfkit
        self.made: list[Machine] = []
        self._tasks = asyncio.all_tasks()
        self._fds = processes.own_descriptors()

    def options(self, name: str = "m", *words: str, **more: Any) -> dict[str, Any]:
        """What the hypervisor's ``create`` takes; also as JSON. ``words`` order the guest's behaviour."""
        at = self.root / name
        origins = {"gvproxy": self.gvproxy, **dataclasses.asdict(self.guest)}
        if self.vfkit is not None:
            origins["vfkit"] = self.vfkit
        return {
            "origin_path": {key: str(path) for key, path in origins.items()},
            "versions": dict.fromkeys(origins, "1"),
            "target_dir": str(at / "target"),
            "socket_dir": str(at / "socket"),
            "log_dir": str(at / "log"),
            "ssh_key_dir": str(at / "keys"),
            "guest": "bare",
            "mounts": [],
            "cpus": 1,
            "memory_mib": 256,
            "data_disk_mib": 256,
            "kernel_cmdline": " ".join([under.QUICKER, *(f"tiny.{word}" for word in words)]),
        } | more

    async def __call__(self, name: str = "m", *words: str, **more: Any) -> Machine:
        """A machine that is not started yet."""
        machine = Machine(await under.create(self.options(name, *words, **more)))
        self.made.append(machine)
        return machine

    @property
    def hypervisor(self) -> str:
        """What they run under."""
        return "qemu" if self.vfkit is None else "vfkit"

    def faults(self, name: str = "m", **faults: Any) -> None:
        """Order what the double of vfkit is to do wrong at its next start (tests/doubles/vfkit/faults.go)."""
        under.doubled()
        (self.root / name / "target" / "double.json").write_text(json.dumps(faults))

    async def leftovers(self) -> list[str]:
        """What is there besides directories and files that are to stay; looked for until it is gone, or 10 s."""
        for _ in range(100):
            if not (found := self._look()):
                break
            await asyncio.sleep(0.1)
        return found

    def _look(self) -> list[str]:
        found = [f"process {pid} {processes.command(pid)}" for pid in holders(self.root)]
        found += [f"zombie {pid}" for pid in processes.zombies()]
        found += [f"lock {path}" for path in sorted(self.root.glob("*/*/ovm.lock")) if _is_locked(path)]
        found += [f"file {path}" for path in sorted(self.root.glob("*/socket/*")) if path.name != "ovm.lock"]
        found += [f"temporary {path}" for path in sorted(self.root.glob("*/target/.*"))]
        found += [f"task {task}" for task in asyncio.all_tasks() - self._tasks - {asyncio.current_task()}]
        found += [f"descriptor {name}" for name in (processes.own_descriptors() - self._fds).elements()]
        return found

    async def end(self) -> None:
        """End every machine, whatever became of the test."""
        for machine in self.made:
            await machine.ovm.stop(force=True)
        left = await self.leftovers()
        for pid in holders(self.root):  # a manager of a test that failed would live on
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert left == [], left


class Machine:
    """A machine with a record of its states, its events, and its state at each event."""

    def __init__(self, machine: ovm.OVM) -> None:
        self.ovm = machine
        self.events: list[str] = []
        self.states: list[str] = []
        self.errors: list[ovm.OVMError] = []
        self.healths: list[ovm.Health] = []
        self.transitions: list[str] = []
        self._move = machine._context.to
        machine._context.to = self._moved  # type: ignore[method-assign]
        for name in EVENT_NAMES:
            machine.on(name, functools.partial(self._heard, name))

    def _heard(self, name: str, *told: ovm.OVMError | ovm.Health) -> None:
        self.events.append(name)
        self.states.append(self.state)
        self.errors += [error for error in told if isinstance(error, ovm.OVMError)]
        self.healths += [health for health in told if isinstance(health, ovm.Health)]

    def _moved(self, state: ovm.VMState) -> None:
        self._move(state)
        self.transitions.append(self.state)

    def collaborate(self, **others: Any) -> None:
        """Replace collaborators of the machine from its next start on."""
        life = self.ovm._life
        life.collaborators = dataclasses.replace(life.collaborators, **others)

    @property
    def state(self) -> str:
        return self.ovm.state.removeprefix("VirtualMachineState")

    def helper(self, name: str) -> int:
        """The process id of a running helper."""
        assert self.ovm._context.session is not None
        return next(child.pid for child in self.ovm._context.session.children if child.name == name)

    async def tell(self, line: str) -> str:
        return await tell(self.ovm.info.ssh_port, line)

    async def order(self, line: str) -> None:
        await order(self.ovm.info.ssh_port, line)

    async def until(self, *, state: str = "", event: str = "", count: int = 1, timeout_s: float = 120.0) -> None:
        """Until the machine went to ``state``, or ``event`` was heard, ``count`` times."""
        async with asyncio.timeout(timeout_s):
            closed = self.events.count("close")
            while (self.transitions if state else self.events).count(state or event) < count:
                assert self.events.count("close") == closed, self.errors
                await asyncio.sleep(0.01)

    def console(self) -> str:
        """What the guest has written to its console since its power was switched on."""
        return (self.ovm.options.log_dir / "console.log").read_text(errors="replace")

    def start_soon(self, **how: Any) -> asyncio.Task[None]:
        return asyncio.create_task(self.ovm.start(**how))

    async def until_step(self, name: str) -> None:
        """Until a start that was just asked for has done the step ``name``."""
        await asyncio.sleep(0)
        async with asyncio.timeout(120):
            while not any(stage.name == name for stage in self.ovm._context.stages):
                await asyncio.sleep(0)


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False
