"""A power cut at any point leaves what the next create makes good: files, records and the data disk.

Every operation of a run is recorded, and for each point in it the states that a file system may show afterwards are
made real (tests/crashes.py says which). Whether such a check finds anything is tested, too: with a flush left out or
two steps exchanged it has to.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from threading import Event
from unittest import mock

import msgspec
import pytest

import soak
from crashes import Disk, Image, Op, Recorder, holding, look, put
from ovm.disks import data, install, verify
from ovm.model.options import OriginPath, Versions
from ovm.paths import TargetPaths
from ovm.trust.atomic import TEMPORARY_PREFIX

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="records Linux's calls")

NAMES = ("gvproxy", "kernel", "initrd", "rootfs")
PRECIOUS = b"precious" * 1000
OF_THE_NEXT_DISK = b"treasure" * 1000
COMBINATIONS = 24 * soak.TENTHS
"""Of the names in a directory, at each point: all, or so many by chance."""
NEXT_RUNS = 40 * soak.TENTHS
"""States of each run in which the next one is tried, by chance."""


def content(name: str, version: str) -> bytes:
    return (f"{name} {version} ".encode() * 2000)[: 9000 + len(name)]


@pytest.fixture(scope="module")
def ram() -> Iterator[Path]:
    """A place where nothing has to be flushed."""
    shared = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="ovm-", dir=shared if os.access(shared, os.W_OK) else None)).resolve()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def origins(ram: Path) -> dict[str, OriginPath]:
    """Of each version; those of 2 are packed."""
    found = {}
    for version in "123":
        directory = ram / f"origin{version}"
        directory.mkdir()
        for name in NAMES:
            (directory / name).write_bytes(content(name, version))
        if version == "2":
            (directory / "kernel").write_bytes(gzip.compress(content("kernel", version)))
            with zipfile.ZipFile(directory / "rootfs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("rootfs", content("rootfs", version))
        paths = {name: directory / name for name in NAMES}
        found[version] = OriginPath(**paths | ({"rootfs": directory / "rootfs.zip"} if version == "2" else {}))
    return found


@pytest.fixture
def empty(ram: Path) -> Iterator[Callable[[], Path]]:
    """Makes directories, each to be used once."""
    made: list[Path] = []

    def make() -> Path:
        while made:
            shutil.rmtree(made.pop())
        made.append(Path(tempfile.mkdtemp(dir=ram)))
        return made[-1]

    yield make
    for directory in made:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def counted() -> Iterator[list[int]]:
    """How many states there were, of each run that was sound in all."""
    states: list[int] = []
    yield states
    if states:
        goal = f"{3 * len(RUNS)} runs sound"
        soak.row("power cut at every point of disk preparation", goal, f"{len(states)} runs, {sum(states)} states")


# --- runs


@dataclass(frozen=True)
class Promise:
    """What must be so from now on, whenever the power is cut."""

    recorded: dict[str, str] = field(default_factory=dict)
    """Whole, of that version, and known to be."""
    written: bytes = b""
    """The data disk is there, and holds this."""
    precious: tuple[bytes, ...] = ()
    """If the data disk is there and holds one of these, it may not be formatted."""
    machine_id: str | None = None


class Run:
    """Some work on ``target`` below a root, recorded."""

    def __init__(
        self, root: Path, before: Disk, origins: dict[str, OriginPath], promise: Promise, *, clones: bool = False
    ) -> None:
        self.before, self.origins = before, origins
        self.target = TargetPaths(root / "machines" / "target")
        self.recorder = Recorder(root, before, clones=clones)
        self.promises: list[tuple[int, Promise]] = [(0, promise)]

    def promise(self, **changes: object) -> None:
        """From here on, which is after the last operation."""
        self.promises.append((len(self.recorder.ops), replace(self.promises[-1][1], **changes)))

    async def prepare(self, versions: dict[str, str], *, force: bool = False) -> None:
        """As create and reset_path() do; an origin of the newest of the versions is given."""
        kept = {n: v for n, v in self.promises[-1][1].recorded.items() if versions[n] == v and not force}
        self.promise(recorded=kept)
        origin = {name: getattr(self.origins[version], name) for name, version in versions.items()}
        await install.prepare(OriginPath(**origin), Versions(**versions), self.target.directory, force=force)
        self.promise(recorded=versions)

    async def ensure(self, size_mib: int = 1) -> None:
        await data.ensure_data_disk(self.target, size_mib)
        self.promise(machine_id=data.load_machine(self.target).machine_id)

    def use(self, content: bytes = PRECIOUS) -> None:
        """The guest writes and is ready. Until that is recorded, it sees itself that the disk is formatted."""
        fd = os.open(self.target.data_disk, os.O_RDWR)
        os.pwrite(fd, content, 70_000)
        os.fsync(fd)
        os.close(fd)
        self.promise(written=content)
        data.save_machine(self.target, msgspec.structs.replace(data.load_machine(self.target), data_ever_ready=True))
        self.promise(precious=(*self.promises[-1][1].precious, content))


def all_of(version: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, version)


async def create(run: Run) -> None:
    run.target.directory.mkdir(parents=True)
    await run.prepare(all_of("1"))
    await run.ensure()
    run.use()


async def upgrade(run: Run) -> None:
    await run.prepare(all_of("2"))
    await run.ensure()


async def upgrade_one(run: Run) -> None:
    await run.prepare(all_of("1") | {"rootfs": "2"})


async def reset(run: Run) -> None:
    await run.prepare(all_of("3"), force=True)


async def reset_with_data(run: Run) -> None:
    await run.prepare(all_of("2"), force=True)
    run.promise(written=b"")
    await data.remove_data(run.target)
    await run.ensure()
    run.use(OF_THE_NEXT_DISK)


async def grow(run: Run) -> None:
    await run.ensure(2)


async def lose_the_disk(run: Run) -> None:
    """Somebody removes it and flushes nothing."""
    run.promise(written=b"")
    run.target.data_disk.unlink()
    await run.ensure()
    run.use(OF_THE_NEXT_DISK)


RUNS: dict[str, Callable[[Run], Awaitable[None]]] = {
    work.__name__: work for work in (create, upgrade, upgrade_one, reset, reset_with_data, grow, lose_the_disk)
}


async def record(name: str, empty: Callable[[], Path], origins: dict[str, OriginPath], *, clones: bool = False) -> Run:
    """The run called so, after a create unless it is that."""
    root = empty()
    first = Run(root, Disk(), origins, Promise(), clones=clones)
    with first.recorder.recording():
        await create(first)
    if name == "create":
        return first
    run = Run(root, holding(look(root)), origins, first.promises[-1][1], clones=clones)
    with run.recorder.recording():
        await RUNS[name](run)
    return run


# --- what must hold


def check(root: Path, promise: Promise) -> None:
    """What is true of a machine's directory at any time, a power cut or not."""
    target = TargetPaths(root / "machines" / "target")
    if not target.directory.exists() and not promise.machine_id:
        return  # the first create was not over
    states = {file.name: file for file in verify._verify(target, Event())}
    try:
        recorded = json.loads(target.versions.read_bytes())
    except (FileNotFoundError, ValueError):
        recorded = {}
    for name, version in recorded.items():
        path = target.directory / name
        assert path.exists(), f"{name} is recorded and not there"
        assert path.read_bytes() == content(name, version), f"{name} is not what its record says"
        assert path.stat().st_mode & 0o777 == (0o755 if name == "gvproxy" else 0o644), f"{name} has another mode"
        assert states[name].state == "ok", f"{name}, which is whole: {states[name]}"
    for name, version in promise.recorded.items():
        assert recorded.get(name) == version, f"{name} was of version {version}, which nobody knows any more"
    held = target.data_disk.read_bytes() if target.data_disk.exists() else b""
    assert promise.written in held, "what the guest has written is gone"
    machine = data.load_machine(target)
    if any(content in held for content in promise.precious):
        assert machine.data_ever_ready, "a used disk may be formatted"
    if promise.machine_id:
        assert machine.machine_id == promise.machine_id, "it has become another machine"


async def check_next(root: Path, promise: Promise, origins: dict[str, OriginPath], version: str) -> None:
    """The next create makes everything good."""
    target = TargetPaths(root / "machines" / "target")
    given = OriginPath(**{name: getattr(origins[version], name) for name in NAMES})
    await install.prepare(given, Versions(**all_of(version)), target.directory)
    disk = await data.ensure_data_disk(target, 1)
    assert disk.size_bytes >= 1 << 20
    check(root, replace(promise, recorded=all_of(version)))
    assert not list(target.directory.glob(TEMPORARY_PREFIX + "*"))


def told(image: Image) -> Image:
    """Without what the next run removes."""
    return {path: what for path, what in image.items() if TEMPORARY_PREFIX not in path}


async def cut_everywhere(
    run: Run, empty: Callable[[], Path], rng: Random, ops: list[Op] | None = None, next_runs: int = NEXT_RUNS
) -> int:
    """Cut the power after each operation; how many states there were. ``ops`` may be other than what was recorded."""
    recorded = run.recorder.ops
    ops = recorded if ops is None else ops
    disk, seen = run.before.copy(), {}
    left = {id(op) for op in ops}
    promises = {sum(id(op) in left for op in recorded[:at]): promise for at, promise in run.promises}
    promise = promises[0]
    for done in range(len(ops) + 1):
        promise = promises.get(done, promise)
        for image in disk.crashed(rng, COMBINATIONS):
            key = hash((promise.written, promise.precious, *promise.recorded.items(), *told(image).items()))
            if key in seen:
                continue
            seen[key] = (done, image, promise)
            with blaming(ops, done, image):
                root = empty()
                put(image, root)
                check(root, promise)
        if done < len(ops):
            disk.apply(ops[done])
    states = list(seen.values())
    for done, image, promise in rng.sample(states, min(next_runs, len(states))):
        with blaming(ops, done, image), mock.patch.object(os, "fsync"):
            root = empty()
            put(image, root)
            await check_next(root, promise, run.origins, rng.choice("123"))
    return len(states)


@contextlib.contextmanager
def blaming(ops: list[Op], done: int, image: Image) -> Iterator[None]:
    """Says after which operation the power was cut, and what was there then."""
    try:
        yield
    except Exception as error:
        last = ", ".join(bare(op) for op in ops[max(done - 3, 0) : done])
        there = ", ".join(path if what is None else f"{path} ({len(what[0])} bytes)" for path, what in image.items())
        raise AssertionError(
            f"{error!r} after {done} of {len(ops)} operations ({last}), seed {soak.SEED}: {there}"
        ) from error


# --- the tests


@pytest.mark.parametrize("clones", [False, True], ids=["copied", "cloned"])
@pytest.mark.parametrize("name", RUNS)
async def test_no_power_cut_leaves_what_the_next_create_cannot_use(name, clones, empty, origins, counted):
    """After a power cut at any write the next create() succeeds with whole files."""
    run = await record(name, empty, origins, clones=clones)
    states = await cut_everywhere(run, empty, soak.random(f"{name} {clones}"))
    assert states >= 3
    counted.append(states)


@pytest.mark.parametrize("name", RUNS)
async def test_nor_one_during_a_run_after_one_that_was_killed(name, empty, origins, counted):
    """The killed run has flushed what it had come to; what it had not, the next one sees and may lose all the same."""
    first = await record(name, empty, origins)
    rng = soak.random(f"killed {name}")
    steps = range(1, len(first.recorder.ops))
    states = 0
    for step in rng.sample(steps, min(len(steps), 4 + soak.TENTHS)):
        second = await go_on(first, step, rng.choice("123"), empty)
        states += await cut_everywhere(second, empty, rng, next_runs=4)
    counted.append(states)


# --- the check has teeth


async def found(run: Run, empty: Callable[[], Path], ops: list[Op]) -> bool:
    """Whether the check finds fault with ``ops``."""
    for attempt in range(5):
        try:
            await cut_everywhere(run, empty, soak.random(f"teeth {attempt}"), ops, next_runs=10)
        except AssertionError:
            return True
    return False


async def killed(name: str, after: str, version: str, empty: Callable[[], Path], origins: dict[str, OriginPath]) -> Run:
    """A create of that version, after the run called ``name`` was killed behind the operation ``after``."""
    first = await record(name, empty, origins)
    at = next(at for at, op in enumerate(first.recorder.ops, start=1) if bare(op) == after)
    return await go_on(first, at, version, empty)


async def go_on(first: Run, at: int, version: str, empty: Callable[[], Path]) -> Run:
    """A create of that version after the first ``at`` operations of another run."""
    disk = first.before.copy()
    for op in first.recorder.ops[:at]:
        disk.apply(op)
    promise = [promise for since, promise in first.promises if since <= at][-1]
    root = empty()
    put(disk.live(), root)
    run = Run(root, disk, first.origins, replace(promise, recorded={}))
    with run.recorder.recording():
        await run.prepare(all_of(version))
        await run.ensure(2)
    return run


def bare(op: Op) -> str:
    """Without the directories."""
    return str(op).replace("machines/target/", "")


REDUNDANT = {
    "flush-names machines/target, after flush-names machines/target": "once is enough",
    "flush-names machines/target, after flush data.img": "the record of the disk's size, which is next, does it again",
    "flush .ovm-new.versions.json, after chmod .ovm-new.versions.json": "it forgets, and so does half of it",
}
"""Flushes that may be left out, and why."""


async def test_a_flush_left_out_is_found(empty, origins):
    """Each and every one, in one of the runs at least: some matter only if there was another disk or run before."""
    runs = {name: await record(name, empty, origins) for name in RUNS}
    cut_short = await killed("upgrade", "rename .ovm-new.kept -> versions.json", "3", empty, origins)
    runs |= {"killed upgrade": cut_short}
    runs |= {"killed grow": await killed("grow", "truncate data.img", "1", empty, origins)}
    missed: dict[str, list[str]] = {}
    caught = set(REDUNDANT)
    for name, run in runs.items():
        ops = run.recorder.ops
        for at, op in enumerate(ops):
            first = not any(before.what == "flush-names" for before in ops[:at])
            words = f"{bare(op)}, " + ("first of all" if first else f"after {bare(ops[at - 1])}")
            if not op.what.startswith("flush") or words in caught:
                continue
            if await found(run, empty, ops[:at] + ops[at + 1 :]):
                caught.add(words)
            else:
                missed.setdefault(words, []).append(name)
    assert not missed.keys() - caught, missed


def placed(ops: list[Op], what: str, before: str) -> list[Op]:
    """With the last operation that is ``what`` before the first one that is ``before``, or at the end."""
    at = max(n for n, op in enumerate(ops) if bare(op) == what)
    rest = ops[:at] + ops[at + 1 :]
    to = next((n for n, op in enumerate(rest) if bare(op) == before), len(rest))
    assert before in {"", *map(bare, rest)}
    return [*rest[:to], ops[at], *rest[to:]]


EXCHANGED = {
    "recorded before the files have their names": (
        "upgrade",
        lambda ops: placed(ops, "rename .ovm-new.versions -> versions.json", "rename .ovm-new.gvproxy -> gvproxy"),
    ),
    "not forgotten": (
        "upgrade_one",
        lambda ops: [op for op in ops if bare(op) != "rename .ovm-new.kept -> versions.json"],
    ),
    "forgotten together with the replacement": (
        "upgrade",
        lambda ops: placed(ops, "rename .ovm-new.kept -> versions.json", "rename .ovm-new.initrd -> initrd"),
    ),
    "digests recorded last": (
        "upgrade_one",
        lambda ops: placed(ops, "rename .ovm-new.digests -> digests.json", ""),
    ),
    "a mode given after the flush": (
        "create",
        lambda ops: placed(ops, "chmod .ovm-new.gvproxy", "rename .ovm-new.digests -> digests.json"),
    ),
    "a name taken before the content is there": (
        "upgrade",
        lambda ops: placed(ops, "rename .ovm-new.rootfs -> rootfs", "flush .ovm-new.rootfs"),
    ),
    "a disk forgotten before it is removed": (
        "reset_with_data",
        lambda ops: placed(ops, "unlink data.img", "flush-names machines"),
    ),
    "a disk recorded before it has its size": (
        "grow",
        lambda ops: placed(ops, "flush data.img", ""),
    ),
}


@pytest.mark.parametrize("what", EXCHANGED)
async def test_two_steps_exchanged_are_found(what, empty, origins):
    """The check finds an order of writes that is not safe."""
    name, exchanged = EXCHANGED[what]
    run = await record(name, empty, origins)
    assert await found(run, empty, exchanged(run.recorder.ops))
