"""The figures of docs/recipe.md, by matplotlib: losses against tokens, fits, gains of candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from recipe.monitor.charts import number
from recipe.monitor.png import COLOURS, GREY, STYLES
from recipe.search.comparison import End, Fit
from recipe.search.statistics import INTERVAL, Gain
from recipe.search.trials import GROUPS

LABELS = {"llmc": "llm.c's hyperparameters", "adamw": "AdamW at its best", "fast": "fast recipe"}
TALLEST = 12
"""Inches of a figure with a line a candidate."""


def draw_losses(ends: dict[str, list[End]], fits: list[Fit], path: Path) -> None:
    """The curves of the longest runs, the ends of all, and the fits, with their interval, through the ends."""
    figure, axes = _begin("Validation loss against tokens", "tokens", "nats a token")
    lowest = min(end.loss for group in ends.values() for end in group)
    highest = max(end.loss for group in ends.values() for end in group)
    first = min(end.tokens for group in ends.values() for end in group)
    last = max(end.tokens for group in ends.values() for end in group)
    for group in (g for g in GROUPS if g in ends):
        style = _style(group)
        longest = [point for point in ends[group][-1].curves[0] if point.tokens]
        axes.plot([p.tokens for p in longest], [p.loss for p in longest], linewidth=1, alpha=0.6, **style)
        x = [end.tokens for end in ends[group] for _ in end.losses]
        y = [loss for end in ends[group] for loss in end.losses]
        axes.plot(x, y, "o", color=style["color"], markersize=5, label=f"{LABELS[group]}: ends of runs")
    tokens = np.geomspace(first, 2 * last, 60)
    for fit in fits:
        colour = _style(fit.group)["color"]
        axes.plot(tokens, fit.law.loss(tokens), color=colour, linewidth=1.7, linestyle=(0, (1, 1)), label=f"{fit.group}: fit")
        if fit.draws:
            low, high = np.percentile([law.loss(tokens) for law in fit.draws], INTERVAL, axis=0)
            axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
    margin = 0.08 * (highest - lowest) or 0.1
    axes.set_xscale("log")
    axes.set(xlim=(0.5 * first, 2 * last), ylim=(lowest - 4 * margin, highest + 4 * margin))
    _token_ticks(axes, sorted({end.tokens for group in ends.values() for end in group}))
    _finish(figure, axes, path)


def draw_gains(stage: str, gains: list[tuple[str, Gain]], path: Path) -> None:
    """A line a candidate: its gain over the baseline, and what the seeds alone make of equal recipes."""
    figure, axes = _begin(f"{stage}: gain over the baseline", "nats, positive is better", "")
    figure.set_figheight(min(TALLEST, 1.5 + 0.3 * len(gains)))
    for row, (_, gain) in enumerate(reversed(gains)):
        colour = {"better": COLOURS[0], "worse": COLOURS[1]}.get(gain.verdict, GREY)
        axes.plot([gain.mean], [row], "o", color=colour, markersize=6)
        if gain.margin is not None:
            axes.hlines(row, gain.mean - gain.margin, gain.mean + gain.margin, color=colour, linewidth=1.2)
    axes.set_yticks(range(len(gains)), [name for name, _ in reversed(gains)], fontsize=8)
    axes.axvline(0, color=GREY, linewidth=1)
    _finish(figure, axes, path)


def _style(group: str) -> dict[str, Any]:
    place = GROUPS.index(group)
    return {"color": COLOURS[place], "linestyle": STYLES[place]}


def _begin(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    return figure, axes


def _token_ticks(axes: Any, places: list[float]) -> None:
    """At the budgets; of ends that are nearly the same only one has its number."""
    kept: list[float] = []
    for place in places:
        if not kept or place > 1.3 * kept[-1]:
            kept.append(place)
    axes.set_xticks(kept, [number(place, "tokens") for place in kept])
    axes.set_xticks([], minor=True)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(color="#d5d5d5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
