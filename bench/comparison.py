"""Two runs side by side, and what got slower by more than they vary."""

from __future__ import annotations

from bench.goals import GOALS
from bench.report import NUMBER_WIDTH, ROW_WIDTH, number
from bench.result import Result
from bench.samples import COMPARABLE, Samples

SMALL = 0.05
"""Less than this share is no change, however little the numbers vary."""


def is_worse(before: Samples, now: Samples) -> bool:
    """Whether every value of now is worse than each one before: chance makes that once in 252 times five and five."""
    if min(len(before.values), len(now.values)) < COMPARABLE or before.unit != now.unit:
        return False
    if now.smaller_is_better:
        return now.least > before.most and now.median > before.median * (1 + SMALL)
    return now.most < before.least and now.median < before.median * (1 - SMALL)


def worse_rows(base: Result, result: Result) -> list[str]:
    """The rows that got worse beyond noise."""
    return [row for row, now in result.rows.items() if row in base.rows and is_worse(base.rows[row], now)]


def compare(base: Result, result: Result) -> str:
    """A table of both; the goals first, whose ratios carry over from one machine to another."""
    heads = "".join(f"{head:>{NUMBER_WIDTH + 2}}" for head in ("base", "now", "now/base"))
    lines = [f"compared with the run of {base.at}", ""]
    if base.host != result.host:
        lines[1:1] = [f"on another machine, or with other programs: {', '.join(_other(base, result))}"]
    lines.append(f"{'':{ROW_WIDTH}}{heads}")
    for goal in GOALS:
        before, now = goal.reached(base.rows), goal.reached(result.rows)
        if before is not None and now is not None:
            told = (number(before, goal.unit), number(now, goal.unit), _quotient(before, now))
            lines.append(f"{goal.name:{ROW_WIDTH}}" + "".join(f"{cell:>{NUMBER_WIDTH + 2}}" for cell in told))
    lines.append("")
    for row, now_samples in result.rows.items():
        if row not in base.rows:
            continue
        then, unit = base.rows[row].median, now_samples.unit
        told = (number(then, unit), number(now_samples.median, unit), _quotient(then, now_samples.median))
        mark = "  WORSE" if is_worse(base.rows[row], now_samples) else ""
        lines.append(f"{row:{ROW_WIDTH}}" + "".join(f"{cell:>{NUMBER_WIDTH + 2}}" for cell in told) + mark)
    worse = worse_rows(base, result)
    lines += ["", f"worse beyond noise: {'; '.join(worse)}" if worse else "nothing got worse beyond noise"]
    return "\n".join(lines)


def _quotient(before: float, now: float) -> str:
    return f"{now / before:.2f}" if before else "-"


def _other(base: Result, result: Result) -> list[str]:
    fields = type(base.host).__struct_fields__
    return [name for name in fields if getattr(base.host, name) != getattr(result.host, name)]
