"""The timing breakdown of a start: the host's and the guest's steps on one axis, as a table and as a picture.

The guest reports its kernel's uptime at each stage of its boot. Each report arrives with a delay, so the earliest
kernel start that any report implies is the most accurate; its error is the delay of the fastest report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape

from ovm.model.info import Stage
from ovm.text.printable import GuestText

Where = Literal["host", "guest", "unit"]

GUEST = "guest: "
_OF_THE_HOST = {
    "guard": "guard",
    "network": "gvproxy, ports",
    "hypervisor": "hypervisor",
    "memory": "memory read",
    "ready": "podman's answer",
}
"""The phase that ends with each stage of the host."""
_OF_THE_GUEST = {"initrd": "kernel", "rootfs": "initrd", "ready": "systemd to ready"}
"""The phase that ends with each stage of the guest."""
_RESUMED = {"ready": "network, ssh, clock, podman's answer"}

UNITS_SHOWN = 16
"""Number of units shown, the slowest ones."""
BAR_COLUMNS = 40


@dataclass(frozen=True, slots=True)
class Phase:
    """A period on the axis that begins with ``start()``."""

    name: str
    where: Where
    began_ms: float
    ended_ms: float

    @property
    def took_ms(self) -> float:
        """Duration."""
        return self.ended_ms - self.began_ms


def kernel_began_ms(stages: Iterable[Stage]) -> float | None:
    """Return when the guest's kernel started, on the host's axis; ``None`` if the guest reported no uptime."""
    begun = [stage.ms - stage.uptime_ms for stage in stages if stage.uptime_ms is not None]
    return min(begun) if begun else None


def phases(stages: Sequence[Stage]) -> list[Phase]:
    """Return the phases between the stages, ordered by their start."""
    resumed = any(stage.name == "memory" for stage in stages)
    names = _OF_THE_HOST | (_RESUMED if resumed else {})
    found: list[Phase] = []
    powered_on = at = 0.0
    for stage in stages:
        if stage.name.startswith(GUEST):
            continue
        if name := names.get(stage.name):
            found.append(Phase(name, "host", at, stage.ms))
        if stage.name == "hypervisor":
            powered_on = stage.ms
        at = stage.ms
    found += _guest_phases([stage for stage in stages if stage.name.startswith(GUEST)], powered_on)
    return sorted(found, key=lambda phase: (phase.began_ms, phase.ended_ms))


def _guest_phases(stages: Sequence[Stage], powered_on: float) -> list[Phase]:
    if not stages:
        return []
    kernel = kernel_began_ms(stages)
    found, at = [], powered_on
    if kernel is not None and kernel > powered_on:
        found.append(Phase("firmware", "guest", powered_on, kernel))
        at = kernel
    for stage in stages:
        said = stage.ms if kernel is None or stage.uptime_ms is None else kernel + stage.uptime_ms
        said = max(at, said)
        told = stage.name.removeprefix(GUEST)
        found.append(Phase(_OF_THE_GUEST.get(told, told), "guest", at, said))
        at = said
    return found


def units(told: str, stages: Sequence[Stage], *, count: int = UNITS_SHOWN) -> list[Phase]:
    """Return the ``count`` units that took longest to become active, if they started before the machine was ready.

    ``told`` is the output of ``systemctl show`` for :data:`UNIT_PROPERTIES`.
    """
    kernel = kernel_began_ms(stages)
    if kernel is None or not stages:
        return []
    ready_ms = stages[-1].ms
    found = []
    for block in told.split("\n\n"):
        properties = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        began, ended = (_microseconds(properties.get(name, "")) for name in UNIT_PROPERTIES[1:])
        if began and ended and ended >= began and kernel + began / 1000 < ready_ms:
            name = str(GuestText(properties.get(UNIT_PROPERTIES[0], "?")))
            found.append(Phase(name, "unit", kernel + began / 1000, kernel + ended / 1000))
    longest = sorted(found, key=lambda unit: unit.took_ms, reverse=True)[:count]
    return sorted(longest, key=lambda unit: unit.began_ms)


UNIT_PROPERTIES = ("Id", "InactiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic")
SHOW_UNITS = ("systemctl", "show", "--type=service", "-p", ",".join(UNIT_PROPERTIES), "*")
"""Queries the guest's units; it runs after the machine is ready, so it does not slow the start."""


_DIGITS_MAX = 18


def _microseconds(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX else 0


def table(found: Sequence[Phase]) -> str:
    """Return the phases as lines of text, each with a bar on a common axis."""
    if not found:
        return ""
    end = max(phase.ended_ms for phase in found)
    width = max(len(_label(phase)) for phase in found)
    lines = [f"{'':{width}}  {'from':>6}  {'took':>6}  milliseconds"]
    for phase in found:
        before = round(phase.began_ms / end * BAR_COLUMNS)
        length = max(1, round(phase.ended_ms / end * BAR_COLUMNS) - before)
        bar = " " * before + ("▒" if phase.where == "unit" else "█") * length
        lines.append(f"{_label(phase):{width}}  {phase.began_ms:6.0f}  {phase.took_ms:6.0f}  {bar}".rstrip())
    return "\n".join(lines)


def _label(phase: Phase) -> str:
    return f"  {phase.name}" if phase.where == "unit" else f"{phase.where}: {phase.name}"


WIDTH, ROW, TOP, BOTTOM, MARGIN = 980, 22, 56, 34, 16
LABELS = 290
"""Width in pixels of the names' column, at the left of the picture."""
LETTER = 6.4
"""Approximate width in pixels of a letter."""
TICKS = 8
COLOURS: dict[Where, str] = {"host": "#3b6ea8", "guest": "#d9772b", "unit": "#b9b9b9"}
_WORDS: dict[Where, str] = {"host": "host", "guest": "guest", "unit": "unit of the guest's systemd"}


def svg(found: Sequence[Phase], title: str) -> str:
    """Return the phases as a self-contained SVG picture."""
    end = max((phase.ended_ms for phase in found), default=1.0)
    scale = (WIDTH - LABELS - 2 * MARGIN - 60) / end
    height = TOP + ROW * len(found) + BOTTOM
    left = LABELS + MARGIN
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12">'
    )
    parts = [opening, f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>']
    parts.append(f'<text x="{MARGIN}" y="22" font-size="15" font-weight="bold" fill="#222222">{escape(title)}</text>')
    parts += _legend(found)
    for tick in _ticks(end):
        x, bottom = left + tick * scale, TOP + ROW * len(found) + 4
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>')
        parts.append(_text(x, bottom + 16, f"{tick:.0f} ms", anchor="middle"))
    for row, phase in enumerate(found):
        x, y = left + phase.began_ms * scale, TOP + ROW * row
        length = max(1.5, phase.took_ms * scale)
        parts.append(_text(left - 8, y + 15, _shortened(phase.name), anchor="end", colour="#222222"))
        parts.append(_bar(x, y + 4, length, ROW - 8, phase.where))
        parts.append(_text(x + length + 5, y + 15, f"{phase.took_ms:.0f}"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = "#555555") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def _bar(x: float, y: float, width: float, height: float, where: Where) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{COLOURS[where]}"/>'


def _legend(found: Sequence[Phase]) -> list[str]:
    parts, x = [], float(MARGIN)
    for where in sorted({phase.where for phase in found}, key=list(COLOURS).index):
        parts += [_bar(x, 33, 11, 11, where), _text(x + 16, 43, _WORDS[where])]
        x += 16 + LETTER * len(_WORDS[where]) + 24
    return parts


def _shortened(name: str) -> str:
    room = int((LABELS - 8) / LETTER)
    return name if len(name) <= room else name[: room - 1] + "…"


def _ticks(end: float) -> list[float]:
    """Return round numbers from 0 to at most ``end``."""
    rough = end / TICKS
    power = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * number for number in range(int(end / step) + 1)]
