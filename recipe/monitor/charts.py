"""Charts as data: what is drawn, where, and with which words. recipe/monitor/page.py and png.py draw them."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

MAX_POINTS = 400
"""Points of a drawn line; of more steps, each point stands for equally many."""
MAX_ROWS = 40
"""Rows of the table of numbers below a chart; of more steps, every n-th is shown."""


@dataclass
class Series:
    """A line or dots over x."""

    label: str
    x: list[float]
    y: list[float]
    colour: int | None
    """Which run's, or None for a reference."""
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    """A band around the line, or error bars of the dots."""
    dots: bool = False
    faint: bool = False
    in_legend: bool = True
    breaks: list[float] = field(default_factory=list)
    """Where on x the line is interrupted."""

    def pieces(self) -> list[slice]:
        """The stretches of its points between the breaks."""
        edges = [0, *(bisect_right(self.x, x) for x in sorted(self.breaks)), len(self.x)]
        return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]


@dataclass
class Chart:
    """One figure."""

    name: str
    """Of its file and its place in the page."""
    title: str
    x_label: str
    y_label: str
    x_unit: str
    """tokens, seconds or steps: how numbers on the axis are written."""
    y_format: str = "{:g}"
    """How its values are written."""
    y_unit: str = ""
    """tokens, for values that are written as those are on the axis."""
    series: list[Series] = field(default_factory=list)
    levels: list[tuple[str, float]] = field(default_factory=list)
    """Horizontal references."""
    marks: list[float] = field(default_factory=list)
    """Where on x the run was restarted."""
    notes: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    """The numbers, as text."""
    x_max: float = 1.0
    """Where the runs end; a little room is left behind it."""
    y_min: float = 0.0
    y_max: float = 1.0

    def fit(self, from_zero: bool = False, hide_start: bool = False) -> Chart:
        """Choose the axes: x ends with the runs, whatever the references do.

        Args:
            from_zero: y begins at 0.
            hide_start: let the start, where a loss falls steeply, lie above the top if it would take up the figure.
        """
        own = [s for s in self.series if s.colour is not None]
        self.x_max = max((x for s in own for x in s.x), default=0.0) or 1.0
        points = [(x, y) for s in self.series for x, y in zip(s.x, s.y, strict=True) if x <= self.x_max]
        for s in own:
            points += [(x, y) for band in (s.low, s.high) for x, y in zip(s.x, band, strict=False)]
        values = [y for _, y in points] + ([] if hide_start else [level for _, level in self.levels])
        low, high = min(values, default=0.0), max(values, default=1.0)
        if hide_start:
            # Each line's own start: against time a run's first step comes only after its set-up.
            late = [
                y
                for s in self.series
                for x, y in zip(s.x, s.y, strict=True)
                if s.x[0] + 0.05 * (self.x_max - s.x[0]) <= x <= self.x_max
            ]
            top = low + 1.1 * (max(late, default=high) - low)
            if high - low > 1.3 * (top - low) > 0:
                high = top
                self.notes.append(f"The first steps, above {top:.2f}, lie off the top.")
        low = 0.0 if from_zero else low
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        self.y_min, self.y_max = (0.0 if from_zero else low - margin), high + margin
        self.levels = [(label, level) for label, level in self.levels if self.y_min <= level <= self.y_max]
        return self

    @property
    def x_end(self) -> float:
        """Where the axis ends."""
        return 1.02 * self.x_max

    def level_side(self, level: float) -> str:
        """left or right: where the words on a horizontal reference have more room to the nearest points."""

        def room(side: str) -> float:
            near = [
                abs(y - level)
                for s in self.series
                for values in (s.y, s.low, s.high)
                for x, y in zip(s.x, values, strict=False)
                if (x <= self.x_end / 3 if side == "left" else 2 * self.x_end / 3 <= x <= self.x_end)
            ]
            return min(near, default=math.inf)

        return max(("left", "right"), key=room)

    def y_ticks(self) -> list[tuple[float, str]]:
        """Where the axis of y has ticks, and what stands there."""
        places = ticks(self.y_min, self.y_max)
        if self.y_unit == "tokens":
            return [(y, number(y, "tokens")) for y in places]
        percent = self.y_format.endswith("%}")
        step = (places[1] - places[0] if len(places) > 1 else places[0]) * (100 if percent else 1)
        digits = next((d for d in range(12) if abs(step - round(step, d)) < 1e-9 * abs(step)), 12)
        return [(y, f"{y:.{digits}%}" if percent else f"{y:,.{digits}f}") for y in places]

    @property
    def description(self) -> str:
        """The figure in words, for those who do not see it."""
        parts = []
        for s in self.series:
            if s.in_legend and s.y:
                shown = [f"{self.y_format.format(y)} at {number(x, self.x_unit)}" for x, y in (_ends(s))]
                parts.append(f"{s.label}: from {' to '.join(shown)} {self.x_unit if self.x_unit == 'tokens' else ''}".strip())
        parts += [f"{label}: {self.y_format.format(level)}" for label, level in self.levels if label]
        return f"{self.title}. {self.y_label} over {self.x_label}. " + "; ".join(parts) + "."


def _ends(s: Series) -> list[tuple[float, float]]:
    return [(s.x[0], s.y[0]), (s.x[-1], s.y[-1])] if len(s.x) > 1 else [(s.x[0], s.y[0])]


def steps_series(label: str, x: list[float], y: list[float | None], colour: int, **style: Any) -> tuple[Series, int]:
    """A line through a value a step, and how many steps a point stands for: beyond MAX_POINTS a point is the mean of
    neighbouring steps, with a band from their lowest to their highest. Steps without a number are left out."""
    known = [(a, b) for a, b in zip(x, y, strict=True) if b is not None and math.isfinite(b)]
    width = -(-len(known) // MAX_POINTS) or 1
    if width == 1:
        return Series(label, [a for a, _ in known], [b for _, b in known], colour, **style), 1
    buckets = [known[i : i + width] for i in range(0, len(known), width)]
    values = [[b for _, b in bucket] for bucket in buckets]
    return (
        Series(
            label,
            [bucket[-1][0] for bucket in buckets],
            [sum(v) / len(v) for v in values],
            colour,
            [min(v) for v in values],
            [max(v) for v in values],
            **style,
        ),
        width,
    )


def every_nth(items: list, limit: int = MAX_ROWS) -> list:
    """At most `limit` items, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return items
    return [items[round(n * (len(items) - 1) / (limit - 1))] for n in range(limit)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two ends, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = size * min((m for m in (1, 2, 2.5, 5, 10)), key=lambda m: abs(math.log(raw / (m * size))))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def time_unit(seconds: float) -> tuple[float, str]:
    """Seconds in the unit for a time of this length, and its name."""
    if seconds >= 2 * 3600:
        return 3600, "hours"
    return (60, "minutes") if seconds >= 120 else (1, "seconds")


def number(value: float, unit: str) -> str:
    """A number on an axis: 2.5B tokens, 12,000 steps, 1.5 hours."""
    if unit == "tokens":
        for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.4g}{letter}"
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
