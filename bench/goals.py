"""What is wanted, and whether it was reached: ratios within one run, and absolute numbers where people feel them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from bench.samples import Samples, Unit

Rows = Mapping[str, Samples]
Form = Literal["median", "most", "ratio", "difference"]
"""How one number is made of the rows: of the first alone, or of the medians of both."""


class Verdict(StrEnum):
    """What became of a goal."""

    MET = "met"
    NEARLY = "within the margin"
    MISSED = "MISSED"
    UNKNOWN = "not measured"


@dataclass(frozen=True, slots=True)
class Goal:
    """A number, and what it is to be."""

    name: str
    form: Form
    row: str
    limit: float
    unit: Unit = "x"
    over: str = ""
    """The row it is compared with: the opponent, or ours without the work."""
    at_least: bool = False
    """Whether more is better."""
    margin: float = 0.1
    """The share of the limit by which it may be missed before the exit status tells: what a quiet machine varies by."""

    def reached(self, rows: Rows) -> float | None:
        """The number of this run; ``None`` if a row for it is missing."""
        if self.row not in rows or (self.over and self.over not in rows):
            return None
        ours = rows[self.row]
        match self.form:
            case "median":
                return ours.median
            case "most":
                return ours.most
            case "ratio":
                return ours.median / rows[self.over].median
            case "difference":
                return ours.median - rows[self.over].median

    def verdict(self, rows: Rows) -> Verdict:
        """Whether it was reached."""
        reached = self.reached(rows)
        if reached is None:
            return Verdict.UNKNOWN
        missed_by = (self.limit - reached if self.at_least else reached - self.limit) / self.limit
        if missed_by <= 0:
            return Verdict.MET
        return Verdict.NEARLY if missed_by <= self.margin else Verdict.MISSED


GOALS = (
    Goal("cold start / stock", "ratio", "cold start: ovm", 0.28, over="cold start: stock"),
    Goal("cold start / bare", "ratio", "cold start: ovm", 1.03, over="cold start: bare", margin=0.05),
    Goal("warm start / cold start", "ratio", "warm start", 0.15, over="cold start: ovm", margin=0.2),
    Goal("warm start", "median", "warm start", 1000, "ms", margin=0.25),  # "about"
    Goal("suspend", "median", "suspend", 1000, "ms"),
    Goal("unpack / unzip", "ratio", "unpack: ovm", 0.5, over="unpack: unzip"),
    Goal("unpacked: allocated / data", "most", "unpack: allocated / data", 1.02, margin=0.0),
    Goal("copy / cp --sparse", "ratio", "copy: ovm, not flushed", 1.0, over="copy: cp --sparse=always"),
    Goal("copy, flushed / cp, then sync", "ratio", "copy: ovm", 1.0, over="copy: cp, then sync"),
    Goal("copy on btrfs", "median", "clone: ovm, btrfs", 20, "ms"),
    Goal("pause", "median", "pause", 10, "ms"),
    Goal("resume, clock set", "median", "resume, clock set", 100, "ms"),
    Goal("clock offset after resume", "median", "clock offset after resume", 2, "ms"),
    Goal("clock offset after resume, worst", "most", "clock offset after resume", 10, "ms"),
    Goal("export_port", "median", "export_port", 5, "ms"),
    Goal("throughput / raw gvproxy", "ratio", "to an exported port", 0.98, over="to gvproxy's own", at_least=True,
         margin=0.05),
    Goal("ovm ls / podman machine ls", "ratio", "ovm ls, 1 machine", 3, over="podman machine ls"),
    Goal("import ovm", "difference", "python, import ovm", 30, "ms", over="python, nothing imported"),
    Goal("ovm ls with 50 machines / with 1", "ratio", "ovm ls, 50 machines", 1.3, over="ovm ls, 1 machine"),
    Goal("idle service: CPU", "median", "idle service: CPU", 0.1, "%"),
    Goal("idle service: memory", "median", "idle service: memory", 64, "MiB"),
    Goal("guest memory at ready", "median", "guest memory at ready", 120, "MiB"),
)  # fmt: skip


def missed(rows: Rows) -> list[Goal]:
    """Those that were missed by more than their margin."""
    return [goal for goal in GOALS if goal.verdict(rows) is Verdict.MISSED]
