"""Find an accelerator that works on this host.

A /dev/kvm that opens may still not work: on nested hosts a vCPU can be created, and then the guest stalls or QEMU
aborts. So ovm boots the guest's own kernel once without a root file system; it must reach its panic ("Unable to mount
root fs") and reset before a deadline. The result is cached until the host reboots.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from ovm.errors import FileError, UnsupportedError
from ovm.hypervisors import Arch
from ovm.process.child import at_last, process_group
from ovm.trust import directories
from ovm.trust.atomic import write_whole
from ovm.trust.files import read_file

Accel = Literal["kvm", "hvf", "tcg"]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ANSWER_MAX_BYTES = 16 << 10
PROBE_DEADLINE_S = 5.0
"""A working KVM needs about one second."""

MACHINE: dict[Arch, str] = {
    "x86_64": "q35,smm=off,sata=off,usb=off,graphics=off",
    "aarch64": "virt,gic-version=max",
}
"""QEMU's machine types. Not microvm, although it boots 0.2 s sooner: it has neither HPET nor PM timer, so a kernel that
cannot calibrate its TSC against the PIT, as happens under TCG on a busy host, hangs because it has no other clock.
The default interrupt controller of ``virt`` may be limited to 8 CPUs; ``max`` is the best that the host supports."""

CONSOLE: dict[Arch, str] = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}

EMULATED_CPU: dict[Arch, str] = {
    "x86_64": "max,-erms,-fsrm",
    "aarch64": "max,pauth-impdef=on",
}
"""CPU models without features that are slow to emulate. A kernel copies and clears pages with ``rep movsb`` if the CPU
reports it as fast, but TCG emulates it byte by byte. Architected pointer authentication doubles the boot time."""

_PANIC = b"Unable to mount root fs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Emulator:
    """An installed QEMU."""

    program: Path
    version: tuple[int, ...]
    arch: Arch
    """Emulated architecture."""


class Answer(msgspec.Struct, frozen=True):
    """The chosen accelerator, and why."""

    accelerator: Accel
    reason: str


def flags(accelerator: Accel, emulator: Emulator) -> list[str]:
    """Return QEMU's options for an accelerator."""
    if accelerator != "tcg":
        return ["-accel", accelerator, "-cpu", "host"]
    cpu = EMULATED_CPU[emulator.arch]
    if emulator.arch == "x86_64" and emulator.version < (8,):
        cpu += ",-cx16"  # QEMU corrupts EFLAGS around cmpxchg16b: one boot in five ends with a double fault
    return ["-accel", "tcg,thread=multi", "-cpu", cpu]


async def choose(wanted: str, emulator: Emulator, *, kernel: Path, cache_dir: Path) -> Answer:
    """Choose the accelerator: ``wanted``, or for ``auto`` the fastest that works here.

    Raises:
        UnsupportedError: ``wanted`` does not exist or work on this host.
    """
    fast: Accel = "hvf" if sys.platform == "darwin" else "kvm"
    if wanted == "tcg":
        return Answer("tcg", "requested")
    if wanted not in {"auto", fast}:
        raise UnsupportedError(f"accelerator {wanted} does not exist on this system", hint=f"use auto, {fast} or tcg")
    if fast == "kvm" and (obstacle := await asyncio.to_thread(_kvm_obstacle)):
        answer = Answer("tcg", obstacle)
    else:
        answer = await _remembered(fast, emulator, kernel, cache_dir)
    if wanted == fast and answer.accelerator != fast:
        raise UnsupportedError(f"accelerator {fast} does not work here: {answer.reason}", hint="use auto or tcg")
    return answer


def _kvm_obstacle() -> str:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return "there is no /dev/kvm"
    except OSError as error:
        return f"/dev/kvm cannot be opened: {error.strerror}; join the group kvm"
    return ""


async def _remembered(fast: Accel, emulator: Emulator, kernel: Path, cache_dir: Path) -> Answer:
    key = await asyncio.to_thread(_key, fast, emulator, kernel)
    memory = cache_dir / f"accelerator-{key}.json"
    if known := await asyncio.to_thread(recall, memory):
        return known
    answer = await probe(fast, emulator, kernel)
    with contextlib.suppress(OSError, FileError):
        await asyncio.to_thread(_write, memory, msgspec.json.encode(answer))
    return answer


def recall(memory: Path) -> Answer | None:
    """Read the answer cached in the file ``memory``; ``None`` if it is missing or damaged."""
    with contextlib.suppress(OSError, FileError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        directories.check(memory.parent)
        return msgspec.json.decode(read_file(memory, ANSWER_MAX_BYTES), type=Answer)
    return None


def _key(fast: Accel, emulator: Emulator, kernel: Path) -> str:
    """Return a key that changes with the host's boot, user, QEMU and kernel."""
    facts = [fast, str(emulator), str(os.getuid()), str(kernel.stat().st_size)]
    facts.append(BOOT_ID.read_text() if BOOT_ID.exists() else "")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _write(path: Path, content: bytes) -> None:
    directories.make(path.parent)
    write_whole(path, content, 0o600, durable=False)


async def probe(accelerator: Accel, emulator: Emulator, kernel: Path, *, timeout_s: float = PROBE_DEADLINE_S) -> Answer:
    """Boot ``kernel`` without a root file system, and check that it panics within ``timeout_s`` seconds."""
    argv = [
        os.fspath(emulator.program),
        "-machine", MACHINE[emulator.arch], *flags(accelerator, emulator), "-m", "256",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-kernel", os.fspath(kernel), "-append", f"console={CONSOLE[emulator.arch]} panic=-1 reboot=t",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ovm-probe-") as directory:
        log_path = Path(directory) / "qemu.log"
        async with process_group((), log_path=Path(directory) / "guard.log") as group:
            child = await group.spawn("qemu", [*argv, "-serial", "stdio"], log_path=log_path)
            async with at_last(partial(child.end, grace_s=0)):
                try:
                    async with asyncio.timeout(timeout_s):
                        reason = await child.wait()
                except TimeoutError:
                    return Answer("tcg", f"a test boot under {accelerator} stalled")
        said = await asyncio.to_thread(log_path.read_bytes)
    if child.process.returncode == 0 and _PANIC in said:
        return Answer(accelerator, "a test boot succeeded")
    lines = said.decode(errors="replace").strip().splitlines()
    return Answer("tcg", f"a test boot under {accelerator} failed: {lines[0] if lines else reason}")
