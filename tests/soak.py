"""How often the fault suite breaks things, from which seed, and the table of what came of it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from random import Random
from typing import Any

import pytest

TENTHS = int(os.environ.get("OVM_SOAK", "1"))
"""How many tenths of the full counts are done: CI does one, ``make soak`` all ten."""
SEED = int(os.environ.get("OVM_SEED", "1"))
TABLE = os.environ.get("OVM_SOAK_TABLE")
"""A file that gets each row as a line of JSON, too."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A promise, and how it was kept."""

    what: str
    goal: str
    reached: str


rows: list[Row] = []


def times(full: int) -> int:
    """How often to do now what is done ``full`` times in all."""
    return max(1, full * TENTHS // 10)


def random(salt: str) -> Random:
    """Random numbers that are the same again for the same $OVM_SEED and ``salt``."""
    return Random(f"{SEED} {salt}")


def row(what: str, goal: str, reached: str) -> None:
    """Puts a line into the table."""
    rows.append(Row(what, goal, reached))
    if TABLE:
        with Path(TABLE).open("a") as file:
            file.write(json.dumps(dataclasses.asdict(rows[-1])) + "\n")


def table(lines: list[Row]) -> str:
    """Aligned by columns."""
    cells = [("what", "goal", "reached"), *((line.what, line.goal, line.reached) for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(2)]
    return "\n".join(f"{what:{widths[0]}}  {goal:{widths[1]}}  {reached}" for what, goal, reached in cells)


def machine() -> str:
    """What it was done on."""
    cpu, memory = platform.machine(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if (told := Path("/proc/cpuinfo")).exists():
        cpu = next(
            (
                line.partition(": ")[2].strip()
                for line in told.read_text().splitlines()
                if line.startswith("model name")
            ),
            cpu,
        )
    load = "load {:.1f} {:.1f} {:.1f}".format(*os.getloadavg())
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} x {cpu}, {memory:.1f} GiB, {system}, {load} at the end"


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """What was generated gets its line in the table, too."""
    generated = item.get_closest_marker("generated")
    if generated and call.when == "call":
        what = f"{generated.args[0]} generated: {item.name.removeprefix('test_').replace('_', ' ')}"
        row(what, "typed error or success", "no other" if call.excinfo is None else "another: see above")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its rows over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[__name__] = [dataclasses.astuple(line) for line in rows]


@pytest.hookimpl(optionalhook=True)  # there may be no workers
def pytest_testnodedown(node: Any) -> None:
    """Takes over a worker's rows; one that died has none."""
    rows.extend(Row(*line) for line in getattr(node, "workeroutput", {}).get(__name__, []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, behind what pytest itself tells; only if something was counted."""
    if rows:
        terminalreporter.section(f"{TENTHS} tenths of the full counts, seed {SEED}")
        terminalreporter.write_line(machine())
        terminalreporter.write_line(table(rows))
