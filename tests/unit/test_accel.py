"""Which accelerator works here: probed, remembered, and told why."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from ovm.errors import UnsupportedError
from ovm.hypervisors import accel
from ovm.hypervisors.accel import Answer, Emulator, choose, flags, probe

PANIC = 'echo "VFS: Unable to mount root fs on unknown-block(0,0)"; exit 0'


@pytest.fixture
def kernel(tmp_path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(b"k" * 100)
    return path


@pytest.fixture
def emulator(tmp_path):
    """A maker of QEMUs that do what a script says; each start leaves a line in ``runs``."""

    def make(script: str) -> Emulator:
        program = tmp_path / "qemu"
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/runs\n{script}\n')
        program.chmod(0o755)
        return Emulator(program=program, version=(7, 2), arch="x86_64")

    return make


@pytest.fixture
def with_kvm(monkeypatch):
    """A host whose /dev/kvm opens."""
    monkeypatch.setattr(accel, "_kvm_obstacle", lambda: "")


def runs(tmp_path) -> int:
    path = tmp_path / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


async def test_a_boot_into_the_panic_is_a_success(emulator, kernel, tmp_path):
    """A kernel that reaches its panic under KVM and resets is what works; it was the given kernel under KVM."""
    answer = await probe("kvm", emulator(PANIC), kernel)
    assert answer == Answer("kvm", "a test boot succeeded")
    told = (tmp_path / "runs").read_text()
    assert "-accel kvm -cpu host" in told
    assert f"-kernel {kernel}" in told


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'qemu: error: kvm run failed' >&2; kill -ABRT $$", "failed: qemu: error: kvm run failed"),
        ("exit 1", "failed: exit status 1"),
        ("exit 0", "failed: exit status 0"),
        ("kill -SEGV $$", "failed: killed by SIGSEGV"),
        (f"({PANIC}); exit 1", "failed: VFS: Unable"),
    ],
)
async def test_anything_else_is_a_failure_with_its_reason(emulator, kernel, script, reason):
    """A QEMU that aborts, or ends without the guest's panic, means tcg, and why is told."""
    answer = await probe("kvm", emulator(script), kernel)
    assert answer.accelerator == "tcg"
    assert reason in answer.reason


async def test_a_guest_that_stalls_is_given_up(emulator, kernel, tmp_path):
    """A vCPU that stands still is given up at the deadline, and nothing of it is left."""
    answer = await probe("kvm", emulator(f"echo $$ > {tmp_path}/pid; exec sleep 60"), kernel, timeout_s=0.1)
    assert answer == Answer("tcg", "a test boot under kvm stalled")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


async def test_a_cancelled_probe_leaves_nothing(emulator, kernel, tmp_path):
    """Cancelling the probe ends the QEMU that it had started."""
    pid = tmp_path / "pid"
    task = asyncio.create_task(
        probe("kvm", emulator(f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60"), kernel)
    )
    async with asyncio.timeout(5):
        while not pid.exists():
            await asyncio.sleep(0.002)
    task.cancel()
    await asyncio.wait({task})
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


async def test_the_answer_is_remembered(emulator, kernel, tmp_path, with_kvm):
    """A second start on the same host boot asks no QEMU."""
    qemu, cache = emulator(PANIC), tmp_path / "cache"
    first = await choose("auto", qemu, kernel=kernel, cache_dir=cache)
    assert first == await choose("auto", qemu, kernel=kernel, cache_dir=cache) == Answer("kvm", "a test boot succeeded")
    assert runs(tmp_path) == 1


@pytest.mark.parametrize("changed", ["boot", "kernel", "qemu"])
async def test_the_answer_is_for_this_boot_kernel_and_qemu(emulator, kernel, tmp_path, with_kvm, monkeypatch, changed):
    """After a reboot, with another kernel or another QEMU, it is asked again."""
    qemu, cache = emulator(PANIC), tmp_path / "cache"
    await choose("auto", qemu, kernel=kernel, cache_dir=cache)
    if changed == "kernel":
        kernel.write_bytes(b"another")
    elif changed == "qemu":
        qemu = Emulator(program=qemu.program, version=(8, 0), arch="x86_64")
    else:
        boot_id = tmp_path / "boot_id"
        boot_id.write_text("another boot")
        monkeypatch.setattr(accel, "BOOT_ID", boot_id)
    await choose("auto", qemu, kernel=kernel, cache_dir=cache)
    assert runs(tmp_path) == 2


@pytest.mark.parametrize("rubbish", [b"", b"{", b"\xff", b'"\xff"', b'{"accelerator": "warp", "reason": ""}'])
async def test_a_spoilt_memory_is_asked_anew(emulator, kernel, tmp_path, with_kvm, rubbish):
    """A remembered answer that cannot be read is no answer."""
    qemu, cache = emulator(PANIC), tmp_path / "cache"
    await choose("auto", qemu, kernel=kernel, cache_dir=cache)
    next(cache.iterdir()).write_bytes(rubbish)
    assert (await choose("auto", qemu, kernel=kernel, cache_dir=cache)).accelerator == "kvm"
    assert runs(tmp_path) == 2


async def test_what_cannot_be_remembered_is_still_known(emulator, kernel, tmp_path, with_kvm):
    """A cache that cannot be written costs a probe, not the start."""
    (tmp_path / "file").touch()
    answer = await choose("auto", emulator(PANIC), kernel=kernel, cache_dir=tmp_path / "file" / "cache")
    assert answer.accelerator == "kvm"


async def test_no_device_needs_no_probe(emulator, kernel, tmp_path, monkeypatch):
    """Where /dev/kvm cannot be opened, tcg is chosen at once and says why."""
    monkeypatch.setattr(accel, "_kvm_obstacle", lambda: "there is no /dev/kvm")
    answer = await choose("auto", emulator(PANIC), kernel=kernel, cache_dir=tmp_path / "cache")
    assert answer == Answer("tcg", "there is no /dev/kvm")
    assert runs(tmp_path) == 0


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (FileNotFoundError(), "there is no /dev/kvm"),
        (PermissionError(13, "Permission denied"), "/dev/kvm cannot be opened: Permission denied; join the group kvm"),
        (OSError(6, "No such device or address"), "/dev/kvm cannot be opened: No such device or address"),
    ],
)
def test_obstacles_are_told(monkeypatch, failure, words):
    """Why /dev/kvm cannot be used is said in words."""

    def refuse(*_args):
        raise failure

    monkeypatch.setattr(accel.os, "open", refuse)
    assert words in accel._kvm_obstacle()


async def test_forced_kvm_that_does_not_work_is_unsupported(emulator, kernel, tmp_path, with_kvm):
    """Who insists on KVM gets an error that says why not, instead of a slow machine."""
    with pytest.raises(UnsupportedError, match="accelerator kvm does not work here: a test boot under kvm failed") as e:
        await choose("kvm", emulator("exit 1"), kernel=kernel, cache_dir=tmp_path / "cache")
    assert "auto" in e.value.hint


async def test_tcg_is_never_probed(emulator, kernel, tmp_path):
    """Who asks for tcg gets it."""
    answer = await choose("tcg", emulator(PANIC), kernel=kernel, cache_dir=tmp_path / "cache")
    assert answer == Answer("tcg", "requested")
    assert runs(tmp_path) == 0


async def test_another_systems_accelerator_is_unsupported(emulator, kernel, tmp_path):
    """hvf on Linux is an error that names what there is."""
    with pytest.raises(UnsupportedError, match="accelerator hvf does not exist on this system") as caught:
        await choose("hvf", emulator(PANIC), kernel=kernel, cache_dir=tmp_path)
    assert "kvm" in caught.value.hint


@pytest.mark.parametrize(
    ("accelerator", "arch", "version", "expected"),
    [
        ("kvm", "x86_64", (7, 2), ["-accel", "kvm", "-cpu", "host"]),
        ("kvm", "aarch64", (7, 2), ["-accel", "kvm", "-cpu", "host"]),
        ("hvf", "aarch64", (9,), ["-accel", "hvf", "-cpu", "host"]),
        ("tcg", "x86_64", (7, 2, 22), ["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm,-cx16"]),
        ("tcg", "x86_64", (8, 0), ["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm"]),
        ("tcg", "x86_64", (10, 1), ["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm"]),
        ("tcg", "aarch64", (7, 2, 22), ["-accel", "tcg,thread=multi", "-cpu", "max,pauth-impdef=on"]),
        ("tcg", "aarch64", (10, 1), ["-accel", "tcg,thread=multi", "-cpu", "max,pauth-impdef=on"]),
    ],
)
def test_the_flags_of_each_accelerator(accelerator, arch, version, expected):
    """An old QEMU emulates an x86 without the instruction that it corrupts, and none what is slow to emulate."""
    assert flags(accelerator, Emulator(program=Path("/qemu"), version=version, arch=arch)) == expected
