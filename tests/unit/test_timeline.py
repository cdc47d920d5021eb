"""The phases of a start: they fill the axis, and are told in a table and a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from ovm.cli import timeline
from ovm.model.info import Stage

COLD = [
    Stage("guard", 20.0),
    Stage("network", 45.0),
    Stage("hypervisor", 100.0),
    Stage("guest: initrd", 2800.0, 2450.0),
    Stage("guest: rootfs", 3600.0, 3251.0),
    Stage("guest: ready", 6500.0, 6160.0),
    Stage("guest", 6501.0),
    Stage("ready", 7000.0),
]
WARM = [
    Stage("guard", 20.0),
    Stage("network", 45.0),
    Stage("hypervisor", 90.0),
    Stage("memory", 180.0),
    Stage("guest", 181.0),
    Stage("ready", 900.0),
]
SHOWN = """\
Id=podman.service
InactiveExitTimestampMonotonic=4000000
ActiveEnterTimestampMonotonic=6000000

Id=later.service
InactiveExitTimestampMonotonic=9000000
ActiveEnterTimestampMonotonic=9500000

Id=never.service
InactiveExitTimestampMonotonic=0
ActiveEnterTimestampMonotonic=0

Id=<odd>&.service
InactiveExitTimestampMonotonic=3500000
ActiveEnterTimestampMonotonic=3600000

nonsense
"""


def spans(stages: list[Stage]) -> list[tuple[str, str, float, float]]:
    return [(p.where, p.name, round(p.began_ms), round(p.ended_ms)) for p in timeline.phases(stages)]


def test_a_cold_start_is_told_from_end_to_end() -> None:
    """The guest's own words count, taken as heard at once by the quickest."""
    assert timeline.kernel_began_ms(COLD) == 340.0
    assert spans(COLD) == [
        ("host", "guard", 0, 20),
        ("host", "gvproxy, ports", 20, 45),
        ("host", "hypervisor", 45, 100),
        ("guest", "firmware", 100, 340),
        ("guest", "kernel", 340, 2790),
        ("guest", "initrd", 2790, 3591),
        ("guest", "systemd to ready", 3591, 6500),
        ("host", "podman's answer", 6501, 7000),
    ]


def test_a_warm_start_has_no_boot() -> None:
    assert spans(WARM) == [
        ("host", "guard", 0, 20),
        ("host", "gvproxy, ports", 20, 45),
        ("host", "hypervisor", 45, 90),
        ("host", "memory read", 90, 180),
        ("host", "network, ssh, clock, podman's answer", 181, 900),
    ]


def test_a_guest_that_does_not_say_how_long_it_runs_is_told_by_what_was_heard() -> None:
    silent = [Stage(stage.name, stage.ms) for stage in COLD]
    assert timeline.kernel_began_ms(silent) is None
    assert ("guest", "kernel", 100, 2800) in spans(silent)
    assert timeline.units(SHOWN, silent) == []


def test_a_guest_that_lies_makes_no_phase_of_less_than_nothing() -> None:
    odd = [*COLD[:3], Stage("guest: initrd", 2800.0, 99999.0), Stage("guest: unheard of", 2900.0, 1.0), *COLD[6:]]
    assert all(phase.took_ms >= 0 for phase in timeline.phases(odd))
    assert "unheard of" in {phase.name for phase in timeline.phases(odd)}


def test_units_are_those_before_the_ready() -> None:
    found = timeline.units(SHOWN, COLD)
    assert [(u.name, u.began_ms, u.ended_ms) for u in found] == [
        ("<odd>&.service", 3840.0, 3940.0),
        ("podman.service", 4340.0, 6340.0),
    ]
    assert [unit.name for unit in timeline.units(SHOWN, COLD, count=1)] == ["podman.service"]


def test_the_table_has_a_bar_for_each() -> None:
    lines = timeline.table([*timeline.phases(COLD), *timeline.units(SHOWN, COLD)]).splitlines()
    assert len(lines) == 1 + 8 + 2
    assert lines[0].split() == ["from", "took", "milliseconds"]
    assert all("█" in line or "▒" in line for line in lines[1:])
    assert max(map(len, lines)) < 100
    assert timeline.table([]) == ""


@pytest.mark.parametrize("stages", [COLD, WARM, []])
def test_the_picture_stands_alone(stages: list[Stage]) -> None:
    """Well-formed, every name in it, and nothing outside of it."""
    found = [*timeline.phases(stages), *timeline.units(SHOWN, stages)]
    root = ET.fromstring(timeline.svg(found, 'a <machine> & "co"'))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    texts = ["".join(element.itertext()) for element in root if element.tag.endswith("text")]
    assert 'a <machine> & "co"' in texts
    for phase in found:
        assert phase.name in texts
    for element in root:
        for x in (float(element.attrib[name]) for name in ("x", "x1", "x2") if name in element.attrib):
            assert 0 <= x <= width
        assert float(element.attrib.get("y", 0)) <= height
    bars = [e for e in root if e.tag.endswith("rect") and e.attrib["fill"] in timeline.COLOURS.values()]
    assert len(bars) == len(found) + len({phase.where for phase in found})


def test_long_names_are_cut() -> None:
    phase = timeline.Phase("x" * 200, "guest", 0, 1)
    root = ET.fromstring(timeline.svg([phase], "t"))
    assert any((element.text or "").endswith("…") for element in root)


def test_ticks_are_round() -> None:
    assert timeline._ticks(7000.0) == [0, 1000, 2000, 3000, 4000, 5000, 6000, 7000]
    assert timeline._ticks(900.0) == [0, 200, 400, 600, 800]
