"""A run as a picture: bars for what is compared, in an SVG that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

from bench.report import machine_lines, number
from bench.result import Result
from bench.samples import Samples

WIDTH, LABEL_WIDTH, NUMBER_WIDTH = 820, 190, 110
BAR, GAP, HEAD, MARGIN = 18, 6, 40, 20
INK, PALE, PAPER = "#1f2933", "#6b7785", "#ffffff"
OURS, THEIRS = "#2563a8", "#b9c3cf"
FONT = "font-family='system-ui, sans-serif'"


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars on one scale; the label and the row of each, ours first."""

    title: str
    bars: tuple[tuple[str, str], ...]


CHARTS = (
    Chart("from nothing to podman's answer", (
        ("ovm, warm", "warm start"), ("ovm, cold", "cold start: ovm"),
        ("the same image by hand", "cold start: bare"), ("Debian's podman", "cold start: stock"),
    )),
    Chart("unpacking the root file system", (
        ("ovm", "unpack: ovm"), ("unzip", "unpack: unzip"), ("bsdtar", "unpack: bsdtar"),
    )),
    Chart("copying it", (
        ("ovm, on btrfs", "clone: ovm, btrfs"), ("ovm", "copy: ovm"), ("cp, then sync", "copy: cp, then sync"),
        ("ovm, not flushed", "copy: ovm, not flushed"), ("cp --sparse=always", "copy: cp --sparse=always"),
    )),
    Chart("listing machines", (
        ("ovm ls", "ovm ls, 1 machine"), ("ovm ls, 50 of them", "ovm ls, 50 machines"),
        ("podman machine ls", "podman machine ls"),
    )),
)  # fmt: skip


def svg(result: Result) -> str:
    """The picture; what was not measured is left out."""
    body: list[str] = []
    y = MARGIN
    for chart in CHARTS:
        bars = [(label, row, result.rows[row]) for label, row in chart.bars if row in result.rows]
        if bars:
            y = _chart(body, chart.title, bars, y)
    for line in (*machine_lines(result.host), f"medians; the thin lines reach from the least to the most; {result.at}"):
        y += 16
        body.append(f"<text x='{MARGIN}' y='{y}' font-size='11' fill='{PALE}'>{escape(line)}</text>")
    height = y + MARGIN
    return "\n".join([
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}'",
        f"  role='img' {FONT}>",
        "<title>What ovm takes, and what its opponents do</title>",
        f"<rect width='{WIDTH}' height='{height}' fill='{PAPER}'/>",
        *body,
        "</svg>",
        "",
    ])  # fmt: skip


def _chart(body: list[str], title: str, bars: list[tuple[str, str, Samples]], y: int) -> int:
    """Draw it at ``y``; returns where the next one begins."""
    scale = (WIDTH - 2 * MARGIN - LABEL_WIDTH - NUMBER_WIDTH) / max(samples.most for _, _, samples in bars)
    left = MARGIN + LABEL_WIDTH
    body.append(f"<text x='{MARGIN}' y='{y + 16}' font-size='15' font-weight='600' fill='{INK}'>{escape(title)}</text>")
    y += HEAD - BAR
    for label, row, samples in bars:
        y += GAP
        fill = OURS if "ovm" in label else THEIRS
        middle, text_y = y + BAR / 2, y + BAR - 5
        end = left + samples.most * scale
        told = escape(number(samples.median, samples.unit))
        body += [
            f"<text x='{left - 8}' y='{text_y}' font-size='13' text-anchor='end' fill='{INK}'>{escape(label)}</text>",
            f"<rect x='{left}' y='{y}' width='{samples.median * scale:.1f}' height='{BAR}' fill='{fill}'>",
            f"<title>{escape(row)}</title></rect>",
            f"<path d='M{left + samples.least * scale:.1f} {middle}H{end:.1f}' stroke='{INK}'/>",
            f"<text x='{end + 8:.1f}' y='{text_y}' font-size='13' fill='{INK}'>{told}</text>",
        ]
        y += BAR
    return y + MARGIN
