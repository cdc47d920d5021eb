"""Generated damage to what a suspended machine left: all of it is seen before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz
from ovm.disks import saved_state
from ovm.disks.saved_state import Suspended
from ovm.machine.suspend import Recall, _disk
from ovm.paths import TargetPaths

FACTS = {"the rootfs": "1 2 3", "the virtual machine": "a"}
MEMORY = bytes(range(256)) * 64 + bytes(70_000)
DISK = bytes(100_000) + b"what people keep" * 1000


@pytest.fixture
def target(tmp_path: Path) -> TargetPaths:
    """A suspended machine."""
    target = TargetPaths(tmp_path)
    target.data_disk.write_bytes(DISK)
    return target


def keep(target: TargetPaths) -> None:
    memory = saved_state.new_memory(target)
    memory_file = memory.path
    memory_file.write_bytes(MEMORY)
    told = {"at": 1.0, "facts": {**FACTS, **_disk(target)}, "ssh_port": 1, "podman_port": None, "forwards": ()}
    saved_state.keep(target, memory, **told)


async def goes_on(target: TargetPaths, now: dict[str, str]) -> bool:
    """Whether a start would; if not, it has been told why, and nothing is left that another could go on from."""
    told: list[str] = []
    recall = Recall(wanted=True, given_up=told.append)
    await recall.look(target, now)
    whole = await recall.is_whole()
    await recall.close()
    assert whole == (not told)
    assert whole == saved_state.is_there(target) == target.memory.exists()
    return whole


@fuzz.examples(1000)
@given(data=st.data(), name=st.sampled_from(["memory", "suspended", "data_disk"]))
async def test_any_damage_is_found(target: TargetPaths, data: st.DataObject, name: str) -> None:
    """Bits flipped, cut, put in; in the memory, the record or, meanwhile, the data disk."""
    target.data_disk.write_bytes(DISK)
    keep(target)
    path: Path = getattr(target, name)
    before = path.read_bytes()
    after = fuzz.mutated(data.draw, before)
    if after == before:
        assert await goes_on(target, FACTS)
        return
    path.write_bytes(after)
    assert not await goes_on(target, FACTS)


@fuzz.examples(1000)
@given(line=fuzz.documents({"format": 1, "at": 1.0, "facts": FACTS, "ssh_port": 1, "podman_port": None,
                            "forwards": [{"protocol": "tcp", "host_address": "::1", "host_port": 1, "guest_port": 1}],
                            "size": len(MEMORY), "pieces": [1]}))  # fmt: skip
async def test_whatever_a_whole_record_says_nothing_else_is_gone_on_from(target: TargetPaths, line: bytes) -> None:
    """Another version's, for one: its checksum is right."""
    keep(target)
    target.suspended.write_bytes(line + b"\n%08x\n" % saved_state._crc32(line))
    assert not await goes_on(target, FACTS)


@fuzz.examples(1000)
@given(facts=st.dictionaries(fuzz.texts, fuzz.texts, max_size=3))
async def test_other_facts_are_another_machine(target: TargetPaths, facts: dict[str, str]) -> None:
    """A saved state is not resumed with other facts, and is with its own."""
    target.data_disk.write_bytes(DISK)
    keep(target)
    assert not await goes_on(target, facts)
    keep(target)
    assert await goes_on(target, FACTS)
    record = msgspec.json.decode(target.suspended.read_bytes().splitlines()[0], type=Suspended)
    assert record.facts.items() >= FACTS.items()
