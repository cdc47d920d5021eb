"""What the benchmark makes of its numbers: verdicts, comparisons, the report, the picture, its file."""

from __future__ import annotations

import asyncio
import itertools
import re
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest

from bench import __main__ as program
from bench import comparison, opponents, picture, plan, programs, report
from bench.goals import GOALS, Goal, Verdict, missed
from bench.result import FORMAT, Host, Noise, Result
from bench.samples import AGAIN, Recorder, Samples, SpoiledError, alternate, timed
from bench.setting import SMOKE, Bench
from ovm.host.programs import Helper

HOST = Host(
    cpu="A & B <CPU>",
    cores=2,
    memory_gib=23.5,
    kernel="6.1",
    python="3.11",
    qemu="7.2",
    gvproxy="0.8.9",
    accelerator="tcg",
    image="0" * 64,
    guest_cpus=2,
    guest_memory_mib=2048,
)
DEADLINE_S = 10.0
QUIET = Noise(load=0.1, busy=0.01)


def ms(*values: float) -> Samples:
    return Samples(unit="ms", values=values)


def fulfilled(goal: Goal, share: float = 1.0) -> dict[str, Samples]:
    """Rows with which ``goal`` reaches ``share`` of its limit."""
    wanted = goal.limit * share
    value = {"difference": 100 + wanted, "ratio": 100 * wanted}.get(goal.form, wanted)
    rows = {goal.row: Samples(unit=goal.unit, values=(value,))}
    return rows | ({goal.over: ms(100)} if goal.over else {})


def result(rows: dict[str, Samples] | None = None, **more) -> Result:
    """A run in which everything was measured, and each goal reached where that can be."""
    every: dict[str, Samples] = {}
    for goal in GOALS:
        every |= {row: ms(*(10.0 + n for n in range(5))) for row in (goal.row, goal.over) if row}
    fields = {
        "format": FORMAT,
        "at": "2026-01-01T00:00:00+00:00",
        "took_s": 600.0,
        "runs": 5,
        "smoke": False,
        "host": HOST,
        "before": QUIET,
        "after": QUIET,
        "rows": every if rows is None else rows,
        "missing": {"warm start": "it cannot be suspended"},
    }
    return Result(**(fields | more))


# Samples


def test_what_is_told_of_samples():
    """Their middle, their ends, and whether less is better."""
    samples = ms(3, 1, 2)
    assert (samples.median, samples.least, samples.most) == (2, 1, 3)
    assert samples.smaller_is_better
    assert not Samples(unit="MiB/s", values=(1,)).smaller_is_better


async def test_the_order_alternates():
    """There and back again; what warms up is done, and not counted."""
    done: list[str] = []
    numbers = itertools.count()

    def side(name):
        async def measure() -> float:
            done.append(name)
            return float(next(numbers))

        return measure

    recorder = Recorder()
    await alternate({"a": side("a"), "b": side("b")}, recorder, runs=3, warm_ups=1)
    assert "".join(done) == "abbaabba"
    assert {row: samples.values for row, samples in recorder.rows().items()} == {"a": (3, 4, 7), "b": (2, 5, 6)}


async def test_what_ends_a_run_early_loses_nothing():
    """Numbers are there as soon as they are known."""
    recorder = Recorder()

    async def fails() -> float:
        raise ValueError("broken")

    async def works() -> float:
        return 1.0

    with pytest.raises(ValueError, match="broken"):
        await alternate({"a": works, "b": fails}, recorder, runs=5, warm_ups=0)
    assert recorder.rows()["a"].values == (1.0,)


async def test_a_spoiled_run_is_made_again():
    """At once, and it is known."""
    recorder = Recorder()
    values = iter((SpoiledError("it hung"), 1.0, 2.0, SpoiledError("it fell"), 3.0))

    async def now_and_then() -> float:
        value = next(values)
        if isinstance(value, SpoiledError):
            raise value
        return value

    await alternate({"a": now_and_then}, recorder, runs=3, warm_ups=0)
    assert recorder.rows()["a"].values == (1, 2, 3)
    assert recorder.spoiled == {"a": ["it hung", "it fell"]}


async def test_a_side_that_is_always_spoiled_is_given_up_and_the_others_go_on():
    """It is measured as often as it may be spoiled, and no more."""
    recorder, tried = Recorder(), itertools.count()

    async def never() -> float:
        raise SpoiledError(f"it hung, {next(tried)}")

    async def works() -> float:
        return 1.0

    await alternate({"a": never, "b": works}, recorder, runs=5, warm_ups=1)
    assert {row: samples.values for row, samples in recorder.rows().items()} == {"b": (1,) * 5}
    assert len(recorder.spoiled["a"]) == AGAIN + 1 == next(tried)


async def test_a_boot_that_hangs_or_fails_is_spoiled(tmp_path, monkeypatch):
    """An opponent's; what it has started is gone."""
    monkeypatch.setattr(opponents, "BOOT_DEADLINE_S", 0.5)
    bench = Bench(
        scale=SMOKE,
        image=tmp_path,
        gvproxy=Helper(tmp_path, (0,)),
        qemu=Helper(tmp_path, (0,)),
        accelerator="tcg",
        cache=tmp_path,
        work=tmp_path,
        tell=print,
    )
    for text, why in (("exec sleep 1000", "was not done within 0.5 s"), ("echo panic; exit 1", "panic")):
        script = tmp_path / "boot"
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o700)
        monkeypatch.setattr(opponents, "BOOT_STOCK", script)
        with pytest.raises(SpoiledError, match=why):
            await opponents.boot_stock(bench, tmp_path)


async def test_time_is_in_milliseconds():
    """Of what is awaited."""

    async def work() -> None:
        return None

    assert 0 <= await timed(work()) < 1000


# Programs


def runs(process: Path) -> bool:
    """Whether it is there, and no zombie."""
    try:
        return bool((process / "cmdline").read_bytes())
    except OSError:
        return False


async def test_what_is_given_up_is_ended_with_all_it_started(tmp_path):
    """A machine that a script booted does not outlive it."""
    pid = tmp_path / "pid"
    script = f"sleep 1000 & echo $! >{pid}.new; mv {pid}.new {pid}; wait"
    running = asyncio.create_task(programs.run(["sh", "-c", script]))
    async with asyncio.timeout(DEADLINE_S):
        while not pid.exists():
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        while runs(Path("/proc") / pid.read_text().strip()):  # what was killed needs a moment to go
            await asyncio.sleep(0.01)


async def test_what_takes_too_long_is_told():
    """And for how long it could run."""
    with pytest.raises(programs.ProgramError, match=r"sleep was not done within 0\.01 s"):
        await programs.run(["sleep", "1000"], deadline_s=0.01)


async def test_what_fails_is_told_with_its_last_words():
    """And what it was asked to do."""
    with pytest.raises(programs.ProgramError, match=r"sh -c .* ended with 3:\nalas"):
        await programs.run(["sh", "-c", "echo alas; exit 3"])


# Goals


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.name)
def test_a_goal_is_met_up_to_its_limit(goal):
    """At the limit it is met, a hair beyond it is not; without its rows nothing is known."""
    better, worse = (1.01, 0.99) if goal.at_least else (0.99, 1.01)
    assert goal.verdict(fulfilled(goal, better)) is Verdict.MET
    assert goal.verdict(fulfilled(goal, worse)) in {Verdict.NEARLY, Verdict.MISSED}
    assert goal.verdict({}) is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("at_least", "value", "verdict"),
    [
        (False, 90, Verdict.MET),
        (False, 100, Verdict.MET),
        (False, 109, Verdict.NEARLY),
        (False, 111, Verdict.MISSED),
        (True, 110, Verdict.MET),
        (True, 91, Verdict.NEARLY),
        (True, 89, Verdict.MISSED),
    ],
)
def test_margins(at_least, value, verdict):
    """A goal that is missed by less than its margin is said to be, and does not fail the run."""
    goal = Goal("g", "median", "row", 100, "ms", at_least=at_least, margin=0.1)
    assert goal.verdict({"row": ms(value)}) is verdict


@pytest.mark.parametrize(
    ("form", "reached"), [("median", 20), ("most", 60), ("ratio", 4), ("difference", 15)]
)  # fmt: skip
def test_how_a_number_is_formed(form, reached):
    """Of the medians, or of the worst."""
    goal = Goal("g", form, "a", 1, over="b" if form in {"ratio", "difference"} else "")
    assert goal.reached({"a": ms(60, 10, 20), "b": ms(5, 4, 6)}) == reached


def test_a_half_measured_ratio_is_unknown():
    """Without the opponent there is nothing to compare with."""
    goal = Goal("g", "ratio", "a", 1, over="b")
    assert goal.reached({"a": ms(1)}) is None


def test_what_was_missed():
    """Those beyond their margin alone."""
    goal = GOALS[0]
    assert missed(fulfilled(goal, 2.0)) == [goal]
    assert missed(fulfilled(goal, 1 + goal.margin / 2)) == []
    assert missed({}) == []


@pytest.mark.parametrize(
    ("share", "smoke", "status"), [(0.5, False, 0), (1.5, False, 1), (1.5, True, 0)]
)  # fmt: skip
def test_the_exit_status(share, smoke, status):
    """1 if a goal was missed beyond its margin; a smoke run judges nothing."""
    assert program.status(result(fulfilled(GOALS[0], share), smoke=smoke)) == status


def test_the_names_of_goals_differ():
    """And each fits its column."""
    names = [goal.name for goal in GOALS]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < report.ROW_WIDTH


# The file


def test_a_result_survives_its_file(tmp_path):
    """All of it."""
    path = tmp_path / "result.json"
    result().save(path)
    assert Result.load(path) == result()


def test_a_result_from_before_boots_were_made_again_can_be_read(tmp_path):
    """An older file does not say what was not counted."""
    path = tmp_path / "result.json"
    told = msgspec.to_builtins(result())
    del told["spoiled"]
    path.write_bytes(msgspec.json.encode(told))
    assert Result.load(path) == result()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"format": 1}'])
def test_what_is_no_result_is_refused(tmp_path, content):
    """With the name of the file."""
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"result\.json"):
        Result.load(path)


def test_another_format_is_refused(tmp_path):
    """Instead of being misread."""
    path = tmp_path / "result.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(result(), format=FORMAT + 1)))
    with pytest.raises(ValueError, match="format"):
        Result.load(path)


# The report


def test_the_report_tells_everything():
    """Each goal with its limit, each row, what was not measured and why, and the machine."""
    text = report.report(result())
    for goal in GOALS:
        assert any(line.startswith(goal.name + " ") and report.limit(goal) in line for line in text.splitlines())
    for row in result().rows:
        assert f"\n{row} " in text
    assert "it cannot be suspended" in text
    assert HOST.cpu in text
    assert "not quiet" not in text


def test_the_report_tells_what_was_not_counted():
    """Each run with its reason, and which rows were given up."""
    text = report.report(result(spoiled={"stop": ["it hung"], "pause": ["it fell"] * (AGAIN + 1)}))
    assert text.count("not counted: pause: it fell") == AGAIN + 1
    assert "not counted: stop: it hung" in text
    assert "given up: pause" in text
    assert "given up: stop" not in text
    assert "not counted" not in report.report(result())


def test_a_noisy_machine_is_told():
    """For then the numbers are worth little."""
    noisy = result(after=Noise(load=3.0, busy=0.8))
    assert [line for line in report.doubts(noisy) if "after" in line]
    assert report.doubts(result()) == []


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.27512, "x", "0.275"), (8796.7, "ms", "8797 ms"), (12.34, "ms", "12.3 ms"), (0.314, "ms", "0.31 ms"),
     (0.05, "%", "0.050 %"), (61.52, "MiB", "61.5 MiB")],
)  # fmt: skip
def test_numbers_have_the_digits_that_mean_something(value, unit, text):
    assert report.number(value, unit) == text


# Two runs


@pytest.mark.parametrize(
    ("before", "now", "worse"),
    [
        (ms(10, 11, 12), ms(13, 14, 15), True),
        (ms(10, 11, 12), ms(11, 14, 15), False),
        (ms(10, 11, 12), ms(7, 8, 9), False),
        (ms(100, 100, 100), ms(101, 101, 101), False),
        (ms(10), ms(20), False),
        (Samples(unit="MiB/s", values=(50, 51, 52)), Samples(unit="MiB/s", values=(30, 31, 32)), True),
        (Samples(unit="MiB/s", values=(30, 31, 32)), Samples(unit="MiB/s", values=(50, 51, 52)), False),
    ],
)
def test_worse_beyond_noise(before, now, worse):
    """When the runs do not overlap, by enough, and there are enough of them."""
    assert comparison.is_worse(before, now) is worse


def test_a_comparison_names_what_got_worse():
    """And only that."""
    base = result({"pause": ms(1, 2, 3), "suspend": ms(4, 5, 6)})
    now = result({"pause": ms(11, 12, 13), "suspend": ms(4, 5, 6), "export_port": ms(1)})
    assert comparison.worse_rows(base, now) == ["pause"]
    text = comparison.compare(base, now)
    assert "worse beyond noise: pause" in text
    assert "6.00" in text
    assert "another machine" not in text


def test_a_comparison_across_machines_says_so():
    """Seconds do not carry over, ratios do."""
    other = msgspec.structs.replace(HOST, cpu="another", qemu="9.0")
    assert "with other programs: cpu, qemu" in comparison.compare(result(host=other), result())


# The picture


@pytest.mark.parametrize("rows", [None, {}, {"unpack: ovm": ms(5), "unpack: unzip": ms(7)}], ids=str)
def test_the_picture_is_whole(rows):
    """Well-formed, with a background of its own, everything inside its frame, and nothing fetched from elsewhere."""
    text = picture.svg(result(rows))
    root = ET.fromstring(text)
    width, height = float(root.get("width")), float(root.get("height"))
    frame = root.find("{*}rect")
    assert (frame.get("fill"), float(frame.get("width")), float(frame.get("height"))) == ("#ffffff", width, height)
    for rect in root.findall("{*}rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width")) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height")) <= height
    for label in root.findall("{*}text"):
        assert float(label.get("x")) < width
        assert float(label.get("y")) <= height
    assert "href" not in text
    assert "url(" not in text


def test_the_picture_has_each_bar():
    """As long as its number is, compared with the others of its chart."""
    root = ET.fromstring(picture.svg(result({"unpack: ovm": ms(50), "unpack: unzip": ms(200)})))
    bars = {rect.find("{*}title").text: float(rect.get("width")) for rect in root.findall("{*}rect")[1:]}
    assert bars["unpack: ovm"] * 4 == pytest.approx(bars["unpack: unzip"], rel=0.01)


def test_every_bar_has_a_row_that_is_measured():
    """A chart of what nobody measures would stay empty without anybody noticing."""
    assert {row for chart in picture.CHARTS for _, row in chart.bars} <= plan.ROWS
    assert {row for goal in GOALS for row in (goal.row, goal.over) if row} <= plan.ROWS


def test_every_row_is_explained():
    """From where to where it goes; none is that is not measured."""
    page = (Path(__file__).parents[2] / "docs" / "numbers.md").read_text(encoding="utf-8")
    table = page.partition("\n## The rows\n")[2].partition("\n## ")[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    explained = [name for first in firsts for name in re.findall("`([^`]+)`", first)]
    unexplained = {row for row in plan.ROWS if not any(fnmatch(row, name.replace("…", "*")) for name in explained)}
    assert unexplained == set()
    assert [name for name in explained if not any(fnmatch(row, name.replace("…", "*")) for row in plan.ROWS)] == []
