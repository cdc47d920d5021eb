"""Whether a file is whole can be told at any time, and what is told is true."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import zipfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovm import cli
from ovm.disks import copying, digest, records, verify
from ovm.disks.digest import PIECE_BYTES, Digest
from ovm.disks.install import prepare
from ovm.model.options import OriginPath, Versions
from ovm.paths import TargetPaths

NAMES = ("gvproxy", "kernel", "initrd", "rootfs")
MIB = 1 << 20
ROOTFS = os.urandom(5000) + bytes(3 * MIB - 5000) + os.urandom(MIB + 9) + bytes(2 * MIB) + b"end"


@pytest.fixture
def origin(tmp_path: Path) -> OriginPath:
    directory = tmp_path / "origin"
    directory.mkdir()
    for name in NAMES:
        (directory / name).write_bytes(f"{name} 1 ".encode() * 1000)
    with (directory / "rootfs").open("wb") as opened:
        for at in range(0, len(ROOTFS), 4096):
            piece = ROOTFS[at : at + 4096]
            opened.seek(len(piece), os.SEEK_CUR) if not any(piece) else opened.write(piece)
        opened.truncate(len(ROOTFS))
    return OriginPath(**{name: directory / name for name in NAMES})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def all_of(version: str) -> Versions:
    return Versions(**dict.fromkeys(NAMES, version))


async def states(target: Path) -> dict[str, str]:
    return {file.name: file.state for file in await verify.verify(target)}


WHOLE = dict.fromkeys(NAMES, "ok")


def of_bytes(content: bytes) -> str:
    """By the book."""
    pieces = [content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES)]
    return hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()


# --- the digest


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, len(ROOTFS)])
@pytest.mark.parametrize("cut", [999_999, PIECE_BYTES, 3 * PIECE_BYTES])
def test_a_digest_does_not_depend_on_how_the_content_comes(size, cut):
    taken, content = Digest(), ROOTFS[:size]
    for at in range(0, size, cut):
        taken.update(content[at : at + cut])
    assert taken.hexdigest() == of_bytes(content)


@pytest.mark.parametrize("seed", range(8))
def test_a_hole_is_as_good_as_zeros(tmp_path, seed):
    """Wherever it begins and ends."""
    rng = random.Random(seed)
    blocks = [rng.choice([b"", b"d" * 4096]) for _ in range(rng.randrange(600, 1200))]
    with (tmp_path / "sparse").open("wb") as opened:
        for number, block in enumerate(blocks):
            opened.seek(number * 4096)
            opened.write(block)
        opened.truncate(len(blocks) * 4096 + seed)
    content = (tmp_path / "sparse").read_bytes()
    with (tmp_path / "sparse").open("rb") as opened:
        assert b"".join(digest.read(opened.fileno())) == content


async def test_the_same_content_has_the_same_digest_in_whatever_way_it_came(origin, tmp_path, monkeypatch):
    """Copied by the kernel, copied by hand, or unpacked."""
    made = {}
    for way in ("kernel", "hand", "zip"):
        given_ = origin
        if way == "hand":
            monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
        if way == "zip":
            archive = origin.rootfs.with_name("rootfs.zip")
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
                opened.write(origin.rootfs, "rootfs")
            kernel = origin.kernel.with_name("kernel.gz")
            kernel.write_bytes(gzip.compress(origin.kernel.read_bytes()))
            given_ = OriginPath(gvproxy=origin.gvproxy, kernel=kernel, initrd=origin.initrd, rootfs=archive)
        await prepare(given_, all_of("1"), tmp_path / way)
        assert await states(tmp_path / way) == WHOLE
        made[way] = records.load(TargetPaths(tmp_path / way)).made
    assert made["kernel"] == made["hand"] == made["zip"]
    assert made["zip"]["rootfs"] == records.Made(file="rootfs", version="1", size=len(ROOTFS), digest=of_bytes(ROOTFS))


# --- the verdict


@pytest.mark.parametrize("at", [0, 4999, MIB, 3 * MIB + 1, 5 * MIB + 8, len(ROOTFS) - 1])
async def test_one_flipped_bit_is_found(origin, target, at):
    """In data, in a hole, and at the end."""
    await prepare(origin, all_of("1"), target)
    with (target / "rootfs").open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 0x10]))
    assert await states(target) == WHOLE | {"rootfs": "damaged"}
    await prepare(origin, all_of("1"), target, force=True)
    assert await states(target) == WHOLE


async def test_what_was_cut_removed_or_swapped_is_found(origin, target):
    await prepare(origin, all_of("1"), target)
    os.truncate(target / "initrd", 100)
    (target / "kernel").unlink()
    (target / "rootfs").unlink()
    (target / "rootfs").symlink_to(origin.rootfs)
    assert await states(target) == WHOLE | {"initrd": "damaged", "kernel": "missing", "rootfs": "missing"}


async def test_only_what_is_replaced_gets_a_new_digest(origin, target):
    """What the others had when they were made counts, not what they have now."""
    await prepare(origin, all_of("1"), target)
    with (target / "initrd").open("r+b") as opened:
        opened.write(b"rotten")
    origin.kernel.write_bytes(b"kernel 2")
    await prepare(origin, Versions(gvproxy="1", kernel="2", initrd="1", rootfs="1"), target)
    assert await states(target) == WHOLE | {"initrd": "damaged"}


@pytest.mark.parametrize("record", [None, b"", b"{", b"[" * 50_000, b'{"kernel": {"file": 1}}', b"\xff", b"x" * 70_000])
async def test_without_a_usable_record_nothing_is_accused_and_nothing_made_anew(origin, target, record):
    await prepare(origin, all_of("1"), target)
    (target / "digests.json").unlink()
    if record is not None:
        (target / "digests.json").write_bytes(record)
    inode = (target / "rootfs").stat().st_ino
    await prepare(origin, all_of("1"), target)
    assert (target / "rootfs").stat().st_ino == inode
    assert await states(target) == dict.fromkeys(NAMES, "unknown")
    await prepare(origin, all_of("1"), target, force=True)
    assert await states(target) == WHOLE


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_no_record_can_raise(tmp_path, content):
    (tmp_path / "versions.json").write_text('{"kernel": "1"}')
    (tmp_path / "digests.json").write_bytes(content)
    assert records.load(TargetPaths(tmp_path)) == records.Records({"kernel": "1"}, {})


async def test_a_digest_counts_for_the_recorded_version_alone(origin, target):
    """Somebody else's versions.json says what no digest of ours is about."""
    await prepare(origin, all_of("1"), target)
    (target / "versions.json").write_text(json.dumps({"kernel": "7", "rootfs": "1"}))
    assert await states(target) == {"kernel": "unknown", "rootfs": "ok"}


async def test_names_and_versions_of_any_characters_are_kept(origin, target):
    odd = origin.kernel.with_name(os.fsdecode(b"k\xffernel"))
    origin.kernel.rename(odd)
    given_ = OriginPath(gvproxy=origin.gvproxy, kernel=odd, initrd=origin.initrd, rootfs=origin.rootfs)
    await prepare(given_, Versions(gvproxy="ä\ud800", kernel="1", initrd="1", rootfs="1"), target)
    assert await states(target) == WHOLE
    (target / odd.name).write_bytes(b"damaged")
    assert await states(target) == WHOLE | {"kernel": "damaged"}


async def test_files_that_are_replaced_under_its_eyes_are_not_accused(origin, target, monkeypatch):
    await prepare(origin, all_of("1"), target)
    original, replaced = digest.read, []

    def read(fd):
        pieces = list(original(fd))
        if not replaced:
            replaced.append(True)
            for path in target.iterdir():  # another process has finished an upgrade
                if path.name in NAMES:
                    path.unlink()
                    path.write_bytes(b"2")
            made = records.Made(file="", version="2", size=1, digest=of_bytes(b"2"))
            entries = {name: msgspec.structs.replace(made, file=name) for name in NAMES}
            (target / "digests.json").write_bytes(records.encode(entries))
            (target / "versions.json").write_bytes(records.encode(dict.fromkeys(NAMES, "2")))
        return iter(pieces)

    monkeypatch.setattr(digest, "read", read)
    assert await states(target) == WHOLE


# --- names


@pytest.mark.parametrize("cloned", [False, True])
async def test_an_older_file_that_bears_the_name_is_not_taken_for_the_recorded_one(origin, target, monkeypatch, cloned):
    """Renamed to B with another content, and back to A: the A that is there is that of the beginning."""
    if not cloned:
        monkeypatch.setattr(copying, "clone", lambda *_: False)
    await prepare(origin, all_of("1"), target)
    renamed = origin.kernel.with_name("B")
    renamed.write_bytes(b"kernel 2")
    other = OriginPath(gvproxy=origin.gvproxy, kernel=renamed, initrd=origin.initrd, rootfs=origin.rootfs)
    two = Versions(gvproxy="1", kernel="2", initrd="1", rootfs="1")
    assert (await prepare(other, two, target)).kernel.read_bytes() == b"kernel 2"
    renamed.replace(origin.kernel)
    files = await prepare(origin, two, target)
    assert files.kernel == target / "kernel"
    assert files.kernel.read_bytes() == b"kernel 2"
    assert await states(target) == WHOLE


# --- the command


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("ovm.cli.doctor.examine", nothing)
    return tmp_path / "home"


async def nothing() -> list[object]:
    """What this host lacks is not the question here."""
    return []


def doctor(capsys, *args: str) -> tuple[int, dict[str, dict[str, str]]]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *args, "--json"])
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] == (not ended.value.code)
    return int(ended.value.code or 0), checks


async def test_the_doctor_verifies_all_machines(origin, home, capsys):
    import asyncio

    for machine in ("default", "other"):
        await prepare(origin, all_of("1"), home / "machines" / machine / "target")
    status, checks = await asyncio.to_thread(doctor, capsys, "--verify")
    assert status == 0
    assert {check["status"] for check in checks.values()} == {"ok"}
    assert set(checks) == {f"{machine}: {name}" for machine in ("default", "other") for name in NAMES}

    rootfs = home / "machines" / "other" / "target" / "rootfs"
    with rootfs.open("r+b") as opened:
        opened.write(b"?")
    status, checks = await asyncio.to_thread(doctor, capsys, "--verify")
    assert status == 1
    assert {name for name, check in checks.items() if check["status"] != "ok"} == {"other: rootfs"}
    assert str(rootfs) in checks["other: rootfs"]["detail"]
    assert "remove the file" in checks["other: rootfs"]["hint"]
    assert (await asyncio.to_thread(doctor, capsys, "--verify", "default"))[0] == 0
    assert (await asyncio.to_thread(doctor, capsys, "--verify", str(rootfs.parent)))[0] == 1

    rootfs.unlink()  # as the hint says
    await prepare(origin, all_of("1"), rootfs.parent)
    assert (await asyncio.to_thread(doctor, capsys, "--verify"))[0] == 0


def test_what_is_not_recorded_is_a_warning(home, capsys):
    target = home / "machines" / "default" / "target"
    target.mkdir(parents=True)
    assert doctor(capsys, "--verify")[1]["default: files"]["status"] == "warn"
    (target / "versions.json").write_text('{"kernel": "1"}')
    status, checks = doctor(capsys, "--verify")
    assert (status, checks["default: kernel"]["status"]) == (0, "warn")


def test_a_machine_is_given_only_to_be_verified(home, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "default"])
    assert ended.value.code == 2
    assert "--verify" in capsys.readouterr().err


# --- what is known beforehand


def known(origin: OriginPath) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in origin.named().items()}


async def test_a_known_digest_saves_reading(origin, target, monkeypatch):
    """What is recorded is what was said, and what is there is held against it."""
    monkeypatch.setattr(digest, "read", lambda _fd: pytest.fail("it was read"))
    await prepare(origin, all_of("1"), target, sha256=known(origin))
    made = records.load(TargetPaths(target)).made
    assert {name: one.digest for name, one in made.items()} == {n: f"sha256:{d}" for n, d in known(origin).items()}
    monkeypatch.undo()
    assert await states(target) == WHOLE
    with (target / "rootfs").open("r+b") as opened:
        opened.seek(MIB)
        opened.write(b"x")
    assert await states(target) == WHOLE | {"rootfs": "damaged"}


async def test_an_origin_that_was_damaged_before_is_found_out(origin, target):
    sha256 = known(origin)
    (origin.kernel).write_bytes(b"damaged " * 1000)
    await prepare(origin, all_of("1"), target, sha256=sha256)
    assert await states(target) == WHOLE | {"kernel": "damaged"}


async def test_what_is_unpacked_is_another_content(origin, target, tmp_path):
    """The digest that is known is the archive's."""
    packed = tmp_path / "rootfs.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rootfs", ROOTFS)
    origin = OriginPath(**(origin.named() | {"rootfs": packed}))
    await prepare(origin, all_of("1"), target, sha256=known(origin))
    made = records.load(TargetPaths(target)).made
    assert made["rootfs"].digest == of_bytes(ROOTFS)
    assert await states(target) == WHOLE
