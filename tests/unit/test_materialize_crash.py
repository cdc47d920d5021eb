"""A run that is cut off at any step is made good by the next one."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import clonefile
from ovm.disks.install import prepare
from ovm.model.options import OriginPath, Versions
from ovm.trust.atomic import TEMPORARY_PREFIX

NAMES = ("gvproxy", "kernel", "initrd", "rootfs")


def content(name: str, version: str) -> bytes:
    return f"{name} {version} ".encode() * 1000


def origins(directory: Path, version: str) -> OriginPath:
    directory.mkdir()
    for name in NAMES:
        whole = content(name, version)
        (directory / name).write_bytes(gzip.compress(whole) if name == "kernel" else whole)  # which is unpacked
    return OriginPath(**{name: directory / name for name in NAMES})


def all_of(version: str) -> Versions:
    return Versions(**dict.fromkeys(NAMES, version))


def recorded(target: Path) -> dict[str, str]:
    return json.loads((target / "versions.json").read_text())


def assert_record_is_true(target: Path) -> None:
    """Whatever is recorded is there, whole, in that version."""
    for name, version in recorded(target).items():
        assert (target / name).read_bytes() == content(name, version)


def assert_complete(target: Path, version: str) -> None:
    assert recorded(target) == dict.fromkeys(NAMES, version)
    assert_record_is_true(target)
    assert not list(target.glob(TEMPORARY_PREFIX + "*"))


@pytest.fixture
def one(tmp_path: Path) -> OriginPath:
    return origins(tmp_path / "one", "1")


@pytest.fixture
def two(tmp_path: Path) -> OriginPath:
    return origins(tmp_path / "two", "2")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


KILLED_AT_EACH_STEP = """
import asyncio, ctypes, json, os, signal, sys
from pathlib import Path
from ovm.model.options import OriginPath, Versions
from ovm.disks import copying, install
import isal.igzip_lib

STEPS = "open fsync replace unlink pwrite copy_file_range ftruncate fchmod chmod dup2".split()
for library in sys.argv[1:]:  # clones as macOS does
    copying._libc = lambda: ctypes.CDLL(library, use_errno=True)
    copying.clone = copying.clone_by_name

def run(origin, version, target, force, die_at):
    left = die_at
    def counted(call):
        def step(*args, **more):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)
        return step
    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    names = ("gvproxy", "kernel", "initrd", "rootfs")
    files = OriginPath(**{name: Path(origin, name) for name in names})
    versions = Versions(**dict.fromkeys(names, version))
    asyncio.run(install.prepare(files, versions, Path(target), force=force))
    os._exit(0)

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        run(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module", params=["copied", "cloned"])
def killed(request, tmp_path_factory):
    """Runs ``prepare`` in a process that is killed at the given system call; says whether it was."""
    if sys.platform != "linux":
        pytest.skip("counts Linux's calls")
    argv = [sys.executable, "-c", KILLED_AT_EACH_STEP]
    if request.param == "cloned":
        argv.append(os.fspath(clonefile.build(tmp_path_factory.mktemp("clonefile"))))
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"

        def run(origin: OriginPath, version: str, target: Path, force: bool, step: int) -> bool:
            line = json.dumps([os.fspath(origin.kernel.parent), version, os.fspath(target), force, step])
            server.stdin.write(line + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            assert code in {0, -9}
            return code == -9

        yield run
        server.stdin.close()


@pytest.mark.parametrize("part", range(12))
@pytest.mark.parametrize("force", [False, True], ids=["upgrade", "reset"])
async def test_a_run_killed_at_any_step_is_made_good_by_the_next(one, two, target, killed, force, part):
    after = {"1": two, "2": one}
    await prepare(one, all_of("1"), target)
    version, step, died = "1", 1 + part, True
    while died:
        wanted = "1" if version == "2" else "2"
        died = killed(after[version], wanted, target, force, step)
        assert_record_is_true(target)
        back = random.Random(step).choice([version, wanted])  # the next run may want either
        await prepare(one if back == "1" else two, all_of(back), target)
        assert_complete(target, back)
        version, step = back, step + 12
    assert step > 20


async def test_a_reset_cut_short_is_finished_by_the_next_run(one, target, killed):
    await prepare(one, all_of("1"), target)
    step = 1
    while True:
        (target / "rootfs").write_bytes(b"damaged")
        died = killed(one, "1", target, True, step)
        if not died or "rootfs" not in recorded(target):
            break
        step += 1
    await prepare(one, all_of("1"), target)
    assert_complete(target, "1")
    assert step < 50, "a reset forgets before it writes, or has only cloned until then"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a descriptor is")
async def test_each_step_is_durable_before_the_next_begins(one, two, target, monkeypatch):
    """What a power cut may reorder lies between two flushes, so this order is what it can do at worst."""
    await prepare(one, all_of("1"), target)
    steps: list[str] = []
    flush, rename = os.fsync, os.replace

    def fsync(fd: int) -> None:
        steps.append("flush " + Path(f"/proc/self/fd/{fd}").readlink().name)
        flush(fd)

    def replace(source: Path, to: Path) -> None:
        steps.append(f"rename {Path(source).name}")
        rename(source, to)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    await prepare(two, all_of("2"), target)
    records = [TEMPORARY_PREFIX + name for name in ("kept", "digests", "versions")]
    new = [TEMPORARY_PREFIX + name for name in NAMES]
    assert steps[0] == "flush target"
    assert sorted(steps[1:8]) == sorted(f"flush {name}" for name in records + new)  # at once, in any order
    assert steps[8:] == [
        *("rename .ovm-new.kept", "flush target"),
        *(f"rename {name}" for name in new),
        *("rename .ovm-new.digests", "flush target"),
        *("rename .ovm-new.versions", "flush target"),
    ]
