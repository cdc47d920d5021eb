"""Disk preparation is killed at random points, again and again in the same directory; the next run makes it good."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import filesystems
import soak
from ovm.disks import data, install, verify
from ovm.model.options import OriginPath, Versions
from ovm.paths import TargetPaths
from ovm.trust.atomic import TEMPORARY_PREFIX

pytestmark = [pytest.mark.soak, pytest.mark.skipif(sys.platform != "linux", reason="mounts file systems of Linux")]

MIB = 1 << 20
NAMES = ("gvproxy", "kernel", "initrd", "rootfs")
PRECIOUS = b"precious" * 1000
KILLS = 80
"""Of each kind of preparation, of which there are four: more than 300 in all."""
STEPS = 100
"""System calls of a preparation, about."""

PREPARE = """
import asyncio, json, os, signal, sys, time
from pathlib import Path
from ovm.model.options import OriginPath, Versions
from ovm.disks import copying, data, install, records
from ovm.paths import TargetPaths
import isal.igzip_lib

STEPS = ("open", "close", "fsync", "replace", "unlink", "pwrite", "pread", "copy_file_range", "ftruncate", "fchmod")

def run(origin, versions, target, force, size_mib, die_at):
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
    origin = OriginPath(**{name: Path(path) for name, path in origin.items()})
    async def work():
        await install.prepare(origin, Versions(**versions), Path(target), force=force)
        await data.ensure_data_disk(TargetPaths(Path(target)), size_mib)
    asyncio.run(work())
    os._exit(0)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    delay = order.pop("delay")
    pid = os.fork()
    if not pid:
        run(**order)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)  # ours until it is waited for
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def prepare_and_die() -> Iterator[Any]:
    """Prepares in a process that is killed at a step or after a time; says whether it was."""
    with subprocess.Popen(
        [sys.executable, "-c", PREPARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin
        assert server.stdout
        assert server.stdout.readline() == "ready\n"

        def run(**order: Any) -> bool:
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            assert code in {0, -9}
            return code == -9

        yield run
        server.stdin.close()


@pytest.fixture(scope="module", params=["ext4", "btrfs"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of that kind."""
    base = tmp_path_factory.mktemp(request.param)
    image = filesystems.make(request.param, base / "image", 256 * MIB)
    with filesystems.mounted(request.param, base / "disk", "-o", "loop", source=os.fspath(image)) as where:
        yield where


def content(name: str, version: str) -> bytes:
    """The same each time; the rootfs has holes."""
    rng = random.Random(f"{name} {version}")
    if name != "rootfs":
        return rng.randbytes(300_000)
    return rng.randbytes(MIB) + bytes(3 * MIB) + rng.randbytes(2 * MIB + 5000) + bytes(MIB - 5000)


def make_origin(directory: Path, version: str, *, packed: bool) -> dict[str, str]:
    directory.mkdir(parents=True)
    paths = {name: directory / name for name in NAMES}
    for name, path in paths.items():
        path.write_bytes(content(name, version))
    if packed:
        paths["kernel"].write_bytes(gzip.compress(content("kernel", version), 1))
        paths["rootfs"] = directory / "rootfs.zip"
        with zipfile.ZipFile(paths["rootfs"], "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("rootfs", content("rootfs", version))
    return {name: os.fspath(path) for name, path in paths.items()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


SUMS = (
    {(n, v): hashlib.sha256(content(n, v)).hexdigest() for n in NAMES for v in "12"} if sys.platform == "linux" else {}
)


def check(target: TargetPaths) -> dict[str, str]:
    """What is recorded, which is true; and the data disk is as it was, and known to be in use."""
    recorded: dict[str, str] = json.loads(target.versions.read_text())
    for name, version in recorded.items():
        assert sha256(target.directory / name) == SUMS[name, version], f"{name} is not whole, or not of {version}"
    with target.data_disk.open("rb") as opened:
        opened.seek(MIB)
        assert opened.read(len(PRECIOUS)) == PRECIOUS
    assert data.load_machine(target).data_ever_ready
    return recorded


async def in_use(target: TargetPaths) -> None:
    await data.ensure_data_disk(target, 8)
    with target.data_disk.open("r+b") as opened:
        opened.seek(MIB)
        opened.write(PRECIOUS)
    data.save_machine(target, msgspec.structs.replace(data.load_machine(target), data_ever_ready=True))


@pytest.mark.parametrize("packed", [False, True], ids=["copied", "unpacked"])
async def test_a_killed_preparation_is_made_good_by_the_next(disk, tmp_path, prepare_and_die, packed, request):
    """Half of the origins lie on the same file system, which shares blocks if it can, half of them elsewhere."""
    kind = request.node.callspec.id
    rng = soak.random(f"disk kills {kind}")
    origins = {
        (version, near): make_origin((disk if near else tmp_path) / f"{kind} {version}", version, packed=packed)
        for version in "12"
        for near in (True, False)
    }
    target = TargetPaths(disk / f"target {kind}")

    async def make(versions: dict[str, str], *, near: bool) -> None:
        given = {name: Path(origins[version, near][name]) for name, version in versions.items()}
        await install.prepare(OriginPath(**given), Versions(**versions), target.directory)

    await make(dict.fromkeys(NAMES, "1"), near=True)
    await in_use(target)
    recorded = check(target)
    began = time.monotonic()
    whole = {
        "origin": origins["2", False],
        "versions": dict.fromkeys(NAMES, "2"),
        "target": os.fspath(target.directory),
    }
    assert not prepare_and_die(**whole, force=True, size_mib=8, die_at=0, delay=None)
    longest = time.monotonic() - began
    kills, rounds, wanted, size_mib = 0, 0, soak.times(KILLS), 8
    while kills < wanted:
        rounds += 1
        assert rounds < 20 * wanted + 50, "it is hardly ever alive long enough to be killed"
        near = rng.random() < 0.5
        versions = {name: rng.choice("12") for name in NAMES}
        force = rng.random() < 0.3
        size_mib += rng.random() < 0.3
        by_time = rng.random() < 0.5
        died = prepare_and_die(
            origin={name: origins[version, near][name] for name, version in versions.items()},
            versions=versions,
            target=os.fspath(target.directory),
            force=force,
            size_mib=size_mib,
            die_at=0 if by_time else rng.randrange(1, STEPS),
            delay=rng.uniform(0.0, longest) if by_time else None,
        )
        kills += died
        words = f"round {rounds} of seed {soak.SEED}: to {versions} from {recorded}, force={force}, near={near}"
        try:
            check(target)
            recorded = {name: rng.choice("12") for name in NAMES}
            await make(recorded, near=rng.random() < 0.5)
            assert check(target) == recorded
            await data.ensure_data_disk(target, size_mib)
            assert check(target) == recorded
            assert {file.state for file in await verify.verify(target.directory)} == {"ok"}
            assert not list(target.directory.glob(TEMPORARY_PREFIX + "*"))
        except Exception as error:
            raise AssertionError(f"{error}, {words}") from error
    soak.row(
        f"SIGKILL of disk preparation, {kind}", f"{wanted} kills, 0 bad", f"{kills} kills in {rounds} rounds, 0 bad"
    )
