"""The live view of a run as lines of a terminal: the same during the training and from another shell."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from recipe.evaluation.records import COMPARABLE, precedence, scored_items, scores_kind
from recipe.monitor.metrics import format_duration

Line = list[tuple[str, str]]
"""A line as pieces of (style, text); the styles are those of STYLES."""
STYLES = {"": "", "bold": "1", "dim": "2", "good": "32", "bad": "31", "accent": "36"}
RECENT_STEPS = 50
"""Steps of which the median speed and MFU and the wait for data are shown; the speed says how long the rest will take."""
HISTORY = 2048
"""Means of the loss that are kept for the sparkline."""


@dataclass
class Glyphs:
    """What bars are made of."""

    full: str
    empty: str
    levels: str
    dot: str
    ellipsis: str


UNICODE = Glyphs("█", "░", "▁▂▃▄▅▆▇█", "·", "…")
ASCII = Glyphs("#", "-", "_.-=*#", "|", "~")


class LossHistory:
    """Means of the loss over equally many steps each, so that a run of any length has at most HISTORY of them."""

    def __init__(self):
        self._means: list[float] = []
        self._width, self._sum, self._count = 1, 0.0, 0

    def add(self, loss: float | None) -> None:
        if loss is None or not math.isfinite(loss):
            return
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count == self._width:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self._means) == HISTORY:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._width *= 2

    def sparkline(self, width: int, levels: str) -> str:
        """The whole history in at most `width` characters, the lowest level at its minimum, on a scale of logarithms."""
        means = self._means
        if not means or width < 1:
            return ""
        columns = min(width, len(means))
        edges = [len(means) * n // columns for n in range(columns + 1)]
        values = [math.log(max(1e-9, sum(means[a:b]) / (b - a))) for a, b in zip(edges, edges[1:], strict=False)]
        low, span = min(values), (max(values) - min(values)) or 1.0
        return "".join(levels[round((value - low) / span * (len(levels) - 1))] for value in values)


@dataclass
class View:
    """What is known of a run, from the records of its metrics.jsonl."""

    name: str
    max_steps: int
    total_tokens: int
    price_per_hour: float | None = None
    """Dollars for the whole machine."""
    gpu_memory_gib: float | None = None
    """Of one GPU, if there are any."""
    evaluate_data: str | None = None
    """The run's, by which records of old runs tell what they are of."""
    sample: str = ""
    last: dict[str, Any] = field(default_factory=dict)
    """The newest record of a step."""
    losses: LossHistory = field(default_factory=LossHistory)
    skipped: int = 0
    wall_seconds: float = 0.0
    _recent: list[dict[str, Any]] = field(default_factory=list)
    """The records of the last RECENT_STEPS steps."""
    _evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, records: list[dict[str, Any]]) -> None:
        """Take in records in the order in which they are written."""
        for record in records:
            if "train_loss" in record:
                self.last = record
                self.losses.add(record["train_loss"])
                self.skipped += record["skipped"]
                self._recent = [*self._recent[1 - RECENT_STEPS :], record]
                if "wall_seconds" not in record:
                    self.wall_seconds += record["step_seconds"]
            self.wall_seconds = max(self.wall_seconds, record.get("wall_seconds", 0.0))
            if record.get("val_loss") is not None:
                self._evaluations["val_loss"] = record
            if record.get("hellaswag_acc_norm") is not None and not self._is_superseded(record):
                self._evaluations["hellaswag_acc_norm"] = record

    def _is_superseded(self, record: dict[str, Any]) -> bool:
        known = self._evaluations.get("hellaswag_acc_norm")
        return known is not None and precedence(record, self.evaluate_data) < precedence(known, self.evaluate_data)

    @property
    def step(self) -> int:
        """The last one."""
        return self.last.get("step", 0)

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the speed of the last steps; None if that is unknown or nothing is left."""
        left = self.total_tokens - self.last.get("tokens", 0)
        return left / self._median("tokens_per_second") if self._recent and left > 0 else None

    def _median(self, name: str) -> float:
        """Of a field over the last steps."""
        return median(r[name] for r in self._recent if r.get(name) is not None)

    def lines(
        self,
        width: int,
        glyphs: Glyphs,
        state: tuple[str, str] | None,
        seconds: float | None = None,
        finished: bool = False,
    ) -> list[Line]:
        """The view at most `width` columns wide.

        Args:
            state: the style and the words for what the run is doing, if that is known.
            seconds: the run's time so far, if it is known better than from its last record.
            finished: whether nothing will be added to it.
        """
        lines = [self._progress(width, glyphs)]
        if self.last:
            lines += [self._loss(width, glyphs), self._speed(glyphs)]
        lines.append(self._time(self.wall_seconds if seconds is None else seconds, "in all" if finished else "so far", glyphs))
        if self._evaluations:
            lines.append(self._evaluation(glyphs))
        if self.sample:
            lines.append([("dim", "sample   "), ("", printable(self.sample))])
        if state:
            style, words = state
            parts = textwrap.wrap(words, max(20, width - 9)) or [""]
            lines += [[("dim", "now      " if not n else " " * 9), (style, part)] for n, part in enumerate(parts)]
        return [clip(line, width, glyphs.ellipsis) for line in lines]

    def _progress(self, width: int, glyphs: Glyphs) -> Line:
        step = self.step
        share = step / self.max_steps if self.max_steps else 0.0
        numbers = f" {share:6.1%}  step {step:,}/{self.max_steps:,}"
        name = self.name if len(self.name) <= max(8, width // 3) else clip([("", self.name)], max(8, width // 3), "…")[0][1]
        room = max(0, width - columns(name) - 2 - len(numbers))
        full = min(room, int(room * share))
        return [("bold", name + "  "), ("good", glyphs.full * full), ("dim", glyphs.empty * (room - full)), ("", numbers)]

    def _loss(self, width: int, glyphs: Glyphs) -> Line:
        last = self.last
        loss = "not finite" if last["train_loss"] is None else f"{last['train_loss']:.4f}"
        norm = "not finite" if last["grad_norm"] is None else f"{last['grad_norm']:.2f}"
        skipped = f" {glyphs.dot} {self.skipped} skipped" if self.skipped else ""
        tail = f"  lr {last['lr']:.2e} {glyphs.dot} norm {norm}"
        room = width - 9 - len(loss) - 2 - len(tail) - len(skipped)
        line = [("dim", "loss     "), ("bold", loss + "  "), ("accent", self.losses.sparkline(room, glyphs.levels)), ("", tail)]
        return [*line, ("bad", skipped)]

    def _speed(self, glyphs: Glyphs) -> Line:
        last, parts = self.last, [f"{self._median('tokens_per_second'):,.0f} tok/s"]
        if last.get("mfu") is not None:
            parts.append(f"MFU {self._median('mfu'):.1%}")
        seconds = sum(r["step_seconds"] for r in self._recent)
        waited = sum(r["data_wait_fraction"] * r["step_seconds"] for r in self._recent)
        parts.append(f"data wait {waited / seconds if seconds else 0.0:.1%}")
        if last.get("gpu_memory_gib") is not None:
            of = f" of {self.gpu_memory_gib:.0f}" if self.gpu_memory_gib else ""
            parts.append(f"memory {last['gpu_memory_gib']:.1f}{of} GiB")
        return [("dim", "speed    "), ("", f" {glyphs.dot} ".join(parts))]

    def _time(self, seconds: float, extent: str, glyphs: Glyphs) -> Line:
        left = self.seconds_left
        text = f"{format_duration(seconds)} {extent}"
        text += "" if left is None else f", {format_duration(left)} left"
        line = [("dim", "time     "), ("", text)]
        if self.price_per_hour is not None:
            money = f"${self.price_per_hour * seconds / 3600:,.2f} {extent}"
            money += "" if left is None else f", ${self.price_per_hour * left / 3600:,.2f} left"
            line += [("", f" {glyphs.dot} "), ("dim", "money "), ("", money)]
        return line

    def _evaluation(self, glyphs: Glyphs) -> Line:
        parts = []
        if record := self._evaluations.get("val_loss"):
            parts.append(f"val loss {record['val_loss']:.4f} @{record['step']:,}")
        if record := self._evaluations.get("hellaswag_acc_norm"):
            kind = scores_kind(record, self.evaluate_data)
            own = " of our own" if kind == "mini" else ""
            few = "" if kind in COMPARABLE else f" ({scored_items(record):,} items{own})"
            parts.append(f"HellaSwag lm-eval {record['hellaswag_acc_norm']:.4f}{few} @{record['step']:,}")
        return [("dim", "eval     "), ("", f" {glyphs.dot} ".join(parts))]


def printable(text: str) -> str:
    """One line of text without control characters: a model's text must not steer the terminal."""
    kept = "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else " " for c in text)
    return " ".join(kept.split())


def columns(text: str) -> int:
    """Columns that text takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def clip(line: Line, width: int, ellipsis: str) -> Line:
    """The line, cut to `width` columns with an ellipsis as its end if it is longer."""
    if sum(columns(text) for _, text in line) <= width:
        return line
    kept, room = [], width - 1
    for style, text in line:
        piece = ""
        for character in text:
            if columns(character) > room:
                return [*kept, (style, piece + ellipsis if width > 0 else "")]
            piece, room = piece + character, room - columns(character)
        kept.append((style, piece))
    return kept


def paint(line: Line, colour: bool) -> str:
    """The line as text, with ANSI colours if `colour`."""
    if not colour:
        return "".join(text for _, text in line)
    return "".join(f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style and text else text for style, text in line)
