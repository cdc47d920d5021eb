"""What came of the tests, and the table of it."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from suites.plan import Known, Suite

Verdict = Literal["passed", "podman's own", "ours", "skipped", "left out"]
BEGIN = "<!-- make clients: begin -->"
END = "<!-- make clients: end -->"
COLUMNS: tuple[Verdict, ...] = ("passed", "podman's own", "ours", "skipped", "left out")


@dataclass(frozen=True)
class Outcome:
    """What came of one test: what failed says, in a line, what it failed of."""

    test: str
    verdict: Verdict
    said: str = ""


@dataclass(frozen=True)
class Ran:
    """What came of one suite. ``ended`` is false if the time was over before all of it had been run."""

    suite: Suite
    outcomes: tuple[Outcome, ...]
    ended: bool = True

    def count(self, verdict: Verdict) -> int:
        """How many tests there are of that."""
        return sum(outcome.verdict == verdict for outcome in self.outcomes)


def known(test: str, table: Iterable[Known]) -> Known | None:
    """The row of a table that speaks of the test."""
    return next((row for row in table if test == row.test or test.startswith(f"{row.test}::")), None)


def outcomes(
    report: Path, suite: Suite, module: str, left_out: Sequence[Known], podmans_own: Sequence[Known]
) -> tuple[Outcome, ...]:
    """The tests of pytest's JUnit report of a module. Without a report, nothing was run."""
    if not report.exists():
        return ()
    found: dict[str, Outcome] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314  # pytest wrote it
        name = name_of(suite, module, case.get("classname", ""), case.get("name", ""))
        failed = case.find("failure") if case.find("failure") is not None else case.find("error")
        verdict: Verdict = "passed"
        if failed is not None:
            verdict = "left out" if known(name, left_out) else "podman's own" if known(name, podmans_own) else "ours"
        elif case.find("skipped") is not None:
            verdict = "left out" if known(name, left_out) else "skipped"
        said = " ".join((failed.get("message") or "").split()) if failed is not None else ""
        if found.get(name) is None or failed is not None:  # a tear-down that failed is a case of its own
            found[name] = Outcome(name, verdict, said)
    return tuple(found.values())


def name_of(suite: Suite, module: str, classname: str, name: str) -> str:
    """``client::module::Class::test``; JUnit has the class behind a path or a package, and none for a function."""
    last = re.split(r"[.:]+", classname)[-1]
    return "::".join([suite.client, module, *([last] if last[:1].isupper() else []), name])


def table(ran: Sequence[Ran], versions: str) -> str:
    """Markdown for docs/clients.md."""
    heads = ["client", "tests of", *COLUMNS]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for one in ran:
        counts = [str(one.count(verdict)) for verdict in COLUMNS]
        tests = one.suite.tests_version + ("" if one.ended else ", not all: out of time")
        lines.append(f"| {one.suite.client} {one.suite.version} | {tests} | {' | '.join(counts)} |")
    return "\n".join([f"With {versions}:", "", *lines])


def reasons(ran: Sequence[Ran], podmans_own: Sequence[Known]) -> str:
    """Why the tests failed that are podman's own: each reason once, with how many tests it stands for."""
    counted = collections.Counter(
        row.why
        for one in ran
        for outcome in one.outcomes
        if outcome.verdict == "podman's own" and (row := known(outcome.test, podmans_own))
    )
    return "\n".join(
        ["| podman's own | tests |", "|---|---|", *(f"| {why} | {n} |" for why, n in counted.most_common())]
    )


def stale(ran: Sequence[Ran], podmans_own: Sequence[Known]) -> list[str]:
    """The rows of which every test that was run has passed: they can go, or say of which podman they are."""
    by_row: dict[str, set[Verdict]] = collections.defaultdict(set)
    for one in ran:
        for outcome in one.outcomes:
            if row := known(outcome.test, podmans_own):
                by_row[row.test].add(outcome.verdict)
    return sorted(test for test, verdicts in by_row.items() if verdicts == {"passed"})


def placed(page: str, text: str) -> str:
    """``page`` with ``text`` between its marks."""
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no {BEGIN}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page)
