"""A run in plain text."""

from __future__ import annotations

from bench.goals import GOALS, Goal, Verdict
from bench.result import Host, Result
from bench.samples import AGAIN, Unit

QUIET = 0.1
"""The share of the processors that may be in use by others."""
ROW_WIDTH, NUMBER_WIDTH = 34, 10


def number(value: float, unit: Unit) -> str:
    """With as many digits as mean something, and its unit unless it is a ratio."""
    digits = 3 if unit in {"x", "%"} else 2 if value < 1 else 1 if value < 1000 else 0
    return f"{value:.{digits}f}" + ("" if unit == "x" else f" {unit}")


def limit(goal: Goal) -> str:
    """What a goal asks for."""
    return f"{'>=' if goal.at_least else '<='} {goal.limit:g}" + ("" if goal.unit == "x" else f" {goal.unit}")


def report(result: Result) -> str:
    """The whole of it: the machine, the goals, the rows, what is not in them and what casts doubt on them."""
    parts = (_host, _goals, _rows, _missing, _spoiled, lambda result: "\n".join(doubts(result)))
    return "\n\n".join(text for part in parts if (text := part(result)))


def doubts(result: Result) -> list[str]:
    """Why the numbers may not be worth much."""
    found = [
        f"The machine was not quiet {when} the run: load {noise.load:.1f}, {noise.busy:.0%} of the processors in use."
        for when, noise in (("before", result.before), ("after", result.after))
        if noise.busy > QUIET
    ]
    if result.smoke:
        found.append("This was a smoke run: each thing once, and small. Its numbers say nothing, and judge nothing.")
    return found


def _host(result: Result) -> str:
    load = f"load {result.before.load:.1f} before, {result.after.load:.1f} after"
    run = f"{result.at}, {result.took_s / 60:.0f} min; {result.runs} runs of each start, alternating; {load}"
    return "\n".join([*machine_lines(result.host), run])


def machine_lines(host: Host) -> list[str]:
    """The machine, in a few lines."""
    return [
        f"{host.cores} x {host.cpu}, {host.memory_gib} GiB, Linux {host.kernel}",
        f"Python {host.python}, QEMU {host.qemu} ({host.accelerator}), gvproxy {host.gvproxy}",
        f"guest: {host.guest_cpus} CPUs, {host.guest_memory_mib} MiB, rootfs sha256:{host.image[:16]}",
    ]


def _goals(result: Result) -> str:
    lines = [f"{'':{ROW_WIDTH}}{'goal':>{NUMBER_WIDTH + 2}}{'reached':>{NUMBER_WIDTH + 2}}"]
    for goal in GOALS:
        reached, verdict = goal.reached(result.rows), goal.verdict(result.rows)
        told = "-" if reached is None else number(reached, goal.unit)
        wanted = limit(goal)
        lines.append(f"{goal.name:{ROW_WIDTH}}{wanted:>{NUMBER_WIDTH + 2}}{told:>{NUMBER_WIDTH + 2}}  {verdict}")
    return "\n".join(lines)


def _rows(result: Result) -> str:
    heads = "".join(f"{head:>{NUMBER_WIDTH}}" for head in ("median", "least", "most", "runs"))
    lines = [f"{'':{ROW_WIDTH}}{heads}"]
    for row, samples in result.rows.items():
        told = "".join(
            f"{number(value, 'x' if samples.unit == 'x' else samples.unit).split()[0]:>{NUMBER_WIDTH}}"
            for value in (samples.median, samples.least, samples.most)
        )
        unit = "" if samples.unit == "x" else samples.unit
        lines.append(f"{row:{ROW_WIDTH}}{told}{len(samples.values):>{NUMBER_WIDTH}}  {unit}".rstrip())
    return "\n".join(lines)


def _missing(result: Result) -> str:
    return "\n".join(f"not measured here: {what}: {why}" for what, why in result.missing.items())


def _spoiled(result: Result) -> str:
    lines = [f"not counted: {row}: {why}" for row, whys in result.spoiled.items() for why in whys]
    given_up = [row for row, whys in result.spoiled.items() if len(whys) > AGAIN]
    return "\n".join([*lines, *(f"given up: {row}" for row in given_up)])


def summary(result: Result) -> str:
    """The last line: how many goals came out how."""
    verdicts = [goal.verdict(result.rows) for goal in GOALS]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in Verdict if verdict in verdicts)
    return f"{len(GOALS)} goals: {counts}"
