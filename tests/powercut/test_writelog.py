"""The log of a real QEMU, without a guest: what its own qemu-io writes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import under
from powercut import records, tapped
from powercut.writelog import DISCARD, FLUSH, SECTOR, Cut, WriteLog

pytestmark = pytest.mark.skipif(under.MAC, reason="QEMU runs machines on Linux")
SIZE = 1 << 20
BLOCK = 4096
QEMU = f"qemu-system-{os.uname().machine}"
Written = Callable[..., WriteLog]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Runs commands of qemu-io, where ``-f`` flushes, on an empty disk, and then flushes it; returns the log."""

    def run(*commands: str, cache: tapped.Cache = "as shipped") -> WriteLog:
        disk, log = tmp_path / "disk", tmp_path / "log"
        with disk.open("xb") as file:
            file.truncate(SIZE)
        qemu = tapped.program(tmp_path / "qemu", Path(under.program(QEMU)), log, cache)
        node = {
            "driver": "raw",
            "node-name": tapped.DISK,
            "discard": "unmap",
            "file": {"driver": "file", "filename": str(disk)},
        }
        talk = [{"execute": "qmp_capabilities"}]
        for command in commands:
            line = {"command-line": f'qemu-io {tapped.DISK} "{command}"'}
            talk.append({"execute": "human-monitor-command", "arguments": line})  # type: ignore[dict-item]
        talk.append({"execute": "quit"})
        done = subprocess.run(
            [qemu, "-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio", "-blockdev", json.dumps(node)],
            input="\n".join(map(json.dumps, talk)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "error" not in done.stdout, done.stdout
        return WriteLog(log)

    return run


def test_reading(written: Written) -> None:
    """Each operation in its order, and nothing before the log had it."""
    log = written("write -f -P 1 0 4k", "write -P 2 8k 512", "discard 0 4k")
    assert [(o.sector, o.sectors, o.flags) for o in log.operations] == [
        (0, 8, 0), (0, 0, FLUSH), (16, 1, 0), (0, 8, DISCARD), (0, 0, FLUSH),
    ]  # fmt: skip
    assert log.data(log.operations[2]) == b"\2" * SECTOR
    assert [log.flushed(position) for position in range(6)] == [0, 0, 2, 2, 2, 5]
    assert [log.next_flush(position) for position in range(6)] == [1, 1, 4, 4, 4, 5]
    assert log.find(b"\2" * SECTOR, range(5)) == [2]
    assert log.position(log.path.stat().st_size) == 5
    assert [log.position(o.ends_at) for o in log.operations] == [1, 2, 3, 4, 5]
    assert log.position(log.operations[3].at + 1) == 4


def test_cutting(written: Written, tmp_path: Path) -> None:
    """What is flushed stays, what is not is kept, torn or lost by luck."""
    log = written("write -P 1 0 4k", "write -f -P 2 8k 4k", "write -P 3 0 4k", "discard 8k 4k", "write -P 4 16k 4k")

    def disk(cut: Cut, **how: object) -> list[bytes]:
        log.rebuild(tmp_path / "cut", SIZE, cut, **how)  # type: ignore[arg-type]
        content = (tmp_path / "cut").read_bytes()
        assert len(content) == SIZE
        return [content[at : at + BLOCK] for at in (0, 2 * BLOCK, 4 * BLOCK)]

    zero, one, two, three, four = (bytes([number]) * BLOCK for number in range(5))
    assert disk(Cut(6, survives=0)) == [one, two, zero]
    assert disk(Cut(6, survives=1)) == [three, zero, four]
    assert disk(Cut(4, survives=1)) == [three, two, zero]
    assert disk(Cut(2, survives=0)) == [zero, zero, zero]
    assert disk(Cut(6, survives=0), durable=5) == [three, zero, zero]
    assert disk(Cut(6, survives=1), without=[3]) == [one, zero, four]
    seen = [disk(Cut(6, survives=0.3, seed=seed)) for seed in range(60)]
    assert {one, three} < {first for first, _, _ in seen}, "torn ones are neither"
    assert {two, zero} < {second for _, second, _ in seen}
    for first, _, last in seen:
        assert {*first} <= {1, 3}
        assert {*last} <= {0, 4}
        assert all(len({*first[at : at + SECTOR]}) == 1 for at in range(0, BLOCK, SECTOR))
    assert disk(Cut(6, survives=0.3, seed=7)) == seen[7]


def test_flushes_that_are_not_passed_on(written: Written) -> None:
    """With cache=unsafe nothing is ever durable."""
    log = written("write -f -P 1 0 4k", "write -f -P 2 0 4k", cache="unsafe")
    assert [o.flags for o in log.operations] == [0, 0]
    assert log.flushed(2) == 0


@pytest.fixture
def files() -> dict[str, bytes]:
    """As the writers would have left them, in the midst of records that were not acknowledged."""
    slots = b"".join(records.record("overwritten", number) for number in (16, 17, 18, 19, 12, 13, 14, 15))
    return {
        "appended": b"".join(records.record("appended", number) for number in range(12))[:-100],
        "overwritten": slots,
        "new": b"",
        **{f"{number // 20}/{number}": records.record("renamed", number) for number in range(50)},
    }


PROMISED = {"appended": 10, "renamed": 45, "overwritten": 18}


def test_nothing_lost(files: dict[str, bytes]) -> None:
    """What is more than was promised does no harm."""
    assert records.lost(PROMISED, files) == []


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("appended", lambda content: content[: -len(records.record("appended", 11))], "appended 10"),
        ("appended", lambda content: content[:3] + b"\0" + content[4:], "appended 1"),
        ("2/45", lambda _: b"", "renamed 45"),
        ("0/7", lambda content: content[:-1] + b"?", "renamed 7"),
        ("overwritten", lambda content: content[:-1], "overwritten 15"),
        (
            "overwritten",
            lambda content: content.replace(b"overwritten 00000017", b"overwritten 00000009"),
            "overwritten 17",
        ),
        ("overwritten", lambda content: bytes(records.SLOT_SIZE) + content[records.SLOT_SIZE :], "overwritten 16"),
    ],
)
def test_losses(files: dict[str, bytes], name: str, damage: Callable[[bytes], bytes], expected: str) -> None:
    """Each is found."""
    files[name] = damage(files[name])
    assert records.lost(PROMISED, files) == [expected]


def test_a_file_that_is_missing(files: dict[str, bytes]) -> None:
    """Is found."""
    del files["1/33"]
    assert records.lost(PROMISED, files) == ["renamed 33"]
