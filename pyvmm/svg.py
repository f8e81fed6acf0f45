"""SVG, as much of it as a chart needs: elements, axes. Texts are escaped, nothing refers to anything outside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


def element(tag: str, *children: str, text: str = "", **attributes: str | float) -> str:
    """``<tag ...>``; ``_`` in a name is ``-``, and one at its end is dropped (``class_``)."""
    said = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"' for name, value in attributes.items()
    )  # fmt: skip
    inner = escape(text) + "".join(children)
    return f"<{tag}{said}>{inner}</{tag}>" if inner else f"<{tag}{said}/>"


def _value(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Scale:
    """From ``low``..``high`` to ``start``..``end`` pixels; what lies outside is put at the border."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Pixels."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 8) -> list[float]:
        """Round values: 1, 2 or 5 times a power of ten, ``about`` as many; for a logarithm the powers."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1)]
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        count = math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9)
        return [(math.ceil(self.low / step - 1e-9) + i) * step for i in range(count + 1)]


def decade_scale(values: Iterable[float], start: float, end: float, least: float, most: float) -> Scale:
    """A logarithmic one from ``least`` to the power of ten above all ``values``, ``most`` at least."""
    highest = max([most, *values])
    return Scale(least, 10.0 ** math.ceil(math.log10(highest) - 1e-9), start, end, logarithmic=True)


def vertical_axis(scale: Scale, left: float, right: float, unit: str, about: int = 8) -> list[str]:
    """Lines across, with what they mean."""
    parts = []
    for tick in scale.ticks(about):
        y = scale(tick)
        parts.append(element("line", x1=left, y1=y, x2=right, y2=y, class_="grid"))
        parts.append(element("text", x=left - 6, y=y + 4, class_="tick right", text=f"{tick:g} {unit}".strip()))
    return parts


def time_axis(scale: Scale, top: float, bottom: float) -> list[str]:
    """Lines down, and seconds below."""
    parts = []
    for tick in scale.ticks():
        x = scale(tick)
        parts.append(element("line", x1=x, y1=top, x2=x, y2=bottom, class_="grid"))
        parts.append(element("text", x=x, y=bottom + 16, class_="tick middle", text=f"{tick:g} s"))
    return parts


def dots(points: Sequence[tuple[float, float]], colour: str) -> str:
    """Thousands of points in one element: strokes of no length, with round ends."""
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
    return element("path", d=path, class_="dots", stroke=colour)


def steps(points: Sequence[tuple[float, float]], floor: float) -> str:
    """The area under a curve that keeps each value until the next one."""
    if not points:
        return ""
    path = f"M{points[0][0]:.1f} {floor:.1f}V{points[0][1]:.1f}"
    path += "".join(f"H{x:.1f}V{y:.1f}" for x, y in points[1:])
    return element("path", d=f"{path}V{floor:.1f}Z", class_="area")


def rows_for(labels: Sequence[tuple[float, str]], letter: float, room: float) -> list[int]:
    """A row for each (x, text), in the order of x, so that no two texts overlap; ``room`` is the right border."""
    ends: list[float] = []
    rows = []
    for x, text in labels:
        width = len(text) * letter + 8
        begin = min(x, room - width)
        row = next((i for i, end in enumerate(ends) if end <= begin), len(ends))
        if row == len(ends):
            ends.append(0.0)
        ends[row] = begin + width
        rows.append(row)
    return rows
