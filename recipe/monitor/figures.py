"""The report's figures: a run's metrics.jsonl as charts, with what others have published beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recipe.evaluation.references import (
    CHANCE,
    HELLASWAG_ITEMS,
    LLMC_BATCH_TOKENS,
    LLMC_CURVES,
    LLMC_SOURCE,
    Reference,
    references,
)
from recipe.monitor.charts import Chart, Series, every_nth, number, steps_series, time_unit
from recipe.monitor.run_record import RunRecord

LLMC_HOURS = 1.5
"""Of llm.c's 124M on 8 A100s, by the title of LLMC_SOURCE."""
LLMC_MACHINE = "8×A100"
SIZE_RATIO = 3
"""A model is compared with published ones of at most this many times as many or as few parameters."""


class Figures:
    """All figures of one or more runs.

    Args:
        llmc: draw llm.c's losses also if the runs' text is not known to be FineWeb.
    """

    def __init__(self, runs: list[RunRecord], names: list[str], llmc: bool = False):
        self.runs, self.names = runs, names
        self._llmc = llmc or all(run.is_fineweb for run in runs)
        self._scale, self._unit = time_unit(max(run.seconds for run in runs))
        self._wall = all(run.has_wall_clock for run in runs)
        """One clock for all runs: where the wall clock of one is unknown, the time of the training steps counts."""

    def losses(self) -> list[Chart]:
        """Loss against tokens and against time."""
        clock = "wall clock" if self._wall else "training steps alone"
        return [
            self._loss("loss_tokens", "Loss against tokens", "tokens", "tokens", self._tokens),
            self._loss("loss_time", "Loss against time", f"{self._unit}, {clock}", self._unit, self._time),
        ]

    def hellaswag(self) -> list[Chart]:
        """One for each style of scoring: their numbers do not compare."""
        return [
            c
            for c in (
                self._hellaswag("lm-eval", "hellaswag_acc_norm", "hellaswag_acc_norm_stderr"),
                self._hellaswag("completion", "hellaswag_completion_acc_norm", "hellaswag_completion_acc_norm_stderr"),
            )
            if c
        ]

    def training(self) -> list[Chart]:
        """A value a step each."""
        charts = [
            self._steps("learning_rate", "Learning rate", "lr", "{:.2g}", "learning rate", from_zero=True),
            self._steps("gradient_norm", "Gradient norm, before clipping", "grad_norm", "{:.2f}", "norm", hide_start=True),
            self._steps("throughput", "Throughput", "tokens_per_second", "{:,.0f}", "tokens/s", from_zero=True),
            self._steps("mfu", "Model FLOPs utilisation (causal)", "mfu", "{:.1%}", "share of the peak", from_zero=True),
            self._steps("data_wait", "Waiting for data", "data_wait_fraction", "{:.1%}", "share of the step", from_zero=True),
            self._steps("gpu_memory", "GPU memory of rank 0, most so far", "gpu_memory_gib", "{:.1f}", "GiB", from_zero=True),
            self._skipped(),
        ]
        return [c for c in charts if any(s.x for s in c.series)]

    # --- the axes ---------------------------------------------------------------------------------------------------

    def _tokens(self, run: RunRecord, record: dict[str, Any]) -> float:
        return run.tokens_at(record)

    def _time(self, run: RunRecord, record: dict[str, Any]) -> float:
        return run.seconds_at(record, self._wall) / self._scale

    def _time_of_next(self, run: RunRecord, record: dict[str, Any]) -> float:
        """When the step after a record's began: after a restart, later than the record by what was lost and the set-up."""
        after = next((r for r in run.training if r["step"] > record["step"]), None)
        return self._time(run, record) if after is None else self._time(run, after) - after["step_seconds"] / self._scale

    def _marks(self, position: Callable[[RunRecord, dict], float]) -> list[float]:
        """Where the run went on after an interruption; of several runs only their table tells."""
        return _restarts(self.runs[0], position) if len(self.runs) == 1 else []

    def _label(self, what: str, number: int) -> str:
        return what if len(self.runs) == 1 else f"{self.names[number]}: {what}"

    # --- the figures ------------------------------------------------------------------------------------------------

    def _loss(self, name: str, title: str, label: str, unit: str, position: Callable[[RunRecord, dict], float]) -> Chart:
        chart = Chart(name, title, label, "nats a token", unit, "{:.2f}")
        chart.header = ["run", "step", label, "training loss", "validation loss"]
        widths = []
        for n, run in enumerate(self.runs):
            x, y = [position(run, r) for r in run.training], [r["train_loss"] for r in run.training]
            breaks = [] if unit == "tokens" else _restarts(run, self._time_of_next)
            line, width = steps_series(self._label("training", n), x, y, n, faint=True, breaks=breaks)
            if len(self.runs) > 1:
                line.low, line.high = [], []
            chart.series.append(line)
            widths.append(width)
            validation = run.having("val_loss")
            x, y = [position(run, r) for r in validation], [r["val_loss"] for r in validation]
            chart.series.append(Series(self._label("validation", n), x, y, n, dots=True))
            at = {r["step"]: r["val_loss"] for r in validation}
            shown = {r["step"]: r for r in every_nth(run.training)} | {r["step"]: r for r in validation}
            trained = {r["step"]: r["train_loss"] for r in run.training}
            chart.rows += [
                [
                    self.names[n], f"{step:,}", number(position(run, r), unit), _cell(trained.get(step)), _cell(at.get(step)),
                ]
                for step, r in sorted(shown.items())
            ]  # fmt: skip
        self._note_widths(chart, widths, "Training loss: a")
        chart.marks = self._marks(position if unit == "tokens" else self._time_of_next)
        self._add_llmc(chart, unit)
        return chart.fit(hide_start=True)

    def _add_llmc(self, chart: Chart, unit: str) -> None:
        if not self._llmc:
            chart.notes.append(
                "llm.c's curves are left out: they are of FineWeb in GPT-2's tokens, and losses of other texts do not compare."
            )
            return
        for machine, points in LLMC_CURVES.items():
            if unit == "tokens":
                x = [p.step * LLMC_BATCH_TOKENS for p in points]
            elif machine == LLMC_MACHINE:
                x = [3600 * LLMC_HOURS / self._scale * p.step / points[-1].step for p in points]
            else:
                continue  # how long it took is not published
            y = [p.val_loss for p in points]
            label = f"llm.c 124M, {machine}" if unit != "tokens" else "llm.c 124M, its three published runs"
            _add_reference(chart, label, x, y)
            chart.rows += [
                [f"llm.c {machine}", f"{p.step:,}", number(at, unit), "", _cell(p.val_loss)]
                for p, at in zip(points, x, strict=True)
            ]
        chart.notes.append(f"llm.c's validation losses: {LLMC_SOURCE}.")
        if unit != "tokens":
            chart.notes.append(f"Its {LLMC_HOURS:g} hours on {LLMC_MACHINE} are spread evenly over its steps.")

    def _hellaswag(self, style: str, field: str, stderr: str) -> Chart | None:
        title, name = f"HellaSwag acc_norm, {style} style", f"hellaswag_{style.replace('-', '_')}"
        chart = Chart(name, title, "tokens", "acc_norm", "tokens", "{:.3f}")
        chart.header = ["run", "step", "tokens", "acc_norm", "standard error", "items"]
        kinds = {kind for run in self.runs for kind, _ in run.scores(field)}
        for n, run in enumerate(self.runs):
            for (kind, items), scored in run.scores(field).items():
                if kind == "mini" and len(kinds) > 1:
                    chart.notes.append(f"Of {self.names[n]} scores on {items:,} items of our own are left out.")
                    continue
                x, y = [run.tokens_at(r) for r in scored], [r[field] for r in scored]
                # The harness writes its standard errors to eval/; this is its formula but for a factor of 1 - 1/2n.
                errors = [r.get(stderr) or (v * (1 - v) / items) ** 0.5 for r, v in zip(scored, y, strict=True)]
                low, high = [v - e for v, e in zip(y, errors, strict=True)], [v + e for v, e in zip(y, errors, strict=True)]
                chart.series.append(Series(self._label(f"{items:,} items", n), x, y, n, low, high, dots=True))
                chart.rows += [
                    [self.names[n], f"{r['step']:,}", f"{at:,}", _cell(v), _cell(e), f"{items:,}"]
                    for r, at, v, e in zip(scored, x, y, errors, strict=True)
                ]
                if kind == "part":
                    about = f"Of {self.names[n]} scores are of {items:,} items, the references of all {HELLASWAG_ITEMS:,}."
                    chart.notes.append(about)
        if not chart.series:
            return None
        chart.levels = [("chance", CHANCE)]
        chart.notes.append("Bars are one standard error.")
        if kinds != {"mini"}:
            near = self._references(style)
            chart.levels += [(f"OpenAI's {r.model} {r.acc_norm:.4f}", r.acc_norm) for r in near]
            chart.notes.append(f"OpenAI's figures, in this style, from {', '.join(dict.fromkeys(r.source for r in near))}.")
            if style == "completion":
                self._add_llmc_hellaswag(chart)
        else:
            chart.notes.append("The items are this package's own, a check that the evaluation runs: no reference compares.")
        return chart.fit()

    def _references(self, style: str) -> list[Reference]:
        sizes = [run.parameters for run in self.runs]
        known: list[Reference] = [r for r in references(style) if r.acc_norm is not None]
        near = [r for r in known if any(1 / SIZE_RATIO <= r.parameters / size <= SIZE_RATIO for size in sizes)] or known[:1]
        return near

    def _add_llmc_hellaswag(self, chart: Chart) -> None:
        for machine, points in LLMC_CURVES.items():
            scored = [p for p in points if p.hellaswag_completion_acc_norm is not None]
            if not scored:
                continue
            x, y = [p.step * LLMC_BATCH_TOKENS for p in scored], [p.hellaswag_completion_acc_norm for p in scored]
            _add_reference(chart, "llm.c 124M, its published runs", x, y)
            chart.rows += [
                [f"llm.c {machine}", f"{p.step:,}", f"{at:,}", _cell(v), "", f"{HELLASWAG_ITEMS:,}"]
                for p, at, v in zip(scored, x, y, strict=True)
            ]
        chart.notes.append(f"llm.c's: {LLMC_SOURCE}.")

    def _steps(self, name: str, title: str, field: str, style: str, label: str, **axes: bool) -> Chart:
        chart = Chart(name, title, "tokens", label, "tokens", style, header=["run", "step", "tokens", title])
        widths = []
        for n, run in enumerate(self.runs):
            records = [r for r in run.training if field in r]
            if not any(r[field] is not None for r in records):
                continue
            x, y = [r["tokens"] for r in records], [r[field] for r in records]
            line, width = steps_series(title if len(self.runs) == 1 else self.names[n], x, y, n)
            if len(self.runs) > 1:
                line.low, line.high = [], []
            chart.series.append(line)
            widths.append(width)
            chart.rows += [
                [self.names[n], f"{r['step']:,}", f"{r['tokens']:,}", _cell(r[field], style) or "not finite"]
                for r in every_nth(records)
            ]
        self._note_widths(chart, widths, "A")
        chart.marks = self._marks(self._tokens)
        if field == "tokens_per_second":
            chart.y_unit = "tokens"
        limits = {run.config.max_grad_norm for run in self.runs}
        if field == "grad_norm" and len(limits) == 1 and (limit := limits.pop()):
            chart.levels = [("", limit)]
        chart.fit(**axes)
        if field == "grad_norm" and chart.levels:
            chart.notes.append(f"Dotted: norms above {chart.levels[0][1]:g} are scaled down to it.")
        return chart

    def _note_widths(self, chart: Chart, widths: list[int], words: str) -> None:
        """Say how many steps a point stands for; `widths` of the drawn runs, in their order."""
        wide = sorted({width for width in widths if width > 1})
        if not wide:
            return
        band = ", the band their lowest to highest" if len(self.runs) == 1 else ""
        steps = " or ".join(map(str, wide)) if len(set(widths)) == len(wide) else f"up to {wide[-1]}"
        chart.notes.append(f"{words} point is the mean of {steps} steps{band}.")

    def _skipped(self) -> Chart:
        chart = Chart("skipped", "Skipped steps, in all", "tokens", "steps", "tokens", "{:g}")
        chart.header = ["run", "step", "tokens", "skipped so far"]
        for n, run in enumerate(self.runs):
            total, points = 0, []
            for record in run.training:
                if record["skipped"]:
                    points.append((record["tokens"], total, record["step"]))
                    total += record["skipped"]
                    points.append((record["tokens"], total, record["step"]))
            if points:
                points = [(0, 0, 0), *points, (run.training[-1]["tokens"], total, run.training[-1]["step"])]
                chart.series.append(Series(self._label("skipped", n), [p[0] for p in points], [p[1] for p in points], n))
                chart.rows += [[self.names[n], f"{s:,}", f"{x:,}", f"{y:,}"] for x, y, s in every_nth(points[2::2])]
        return chart.fit(from_zero=True)


def _restarts(run: RunRecord, position: Callable[[RunRecord, dict], float]) -> list[float]:
    by_step = {r["step"]: r for r in run.training}
    return sorted({position(run, by_step[s["step"]]) for s in run.starts[1:] if s["step"] in by_step})


def _add_reference(chart: Chart, label: str, x: list[float], y: list[float]) -> None:
    """Draw a published curve as far as the runs go, or say that it has no point there but its start."""
    end = max((x for s in chart.series if s.colour is not None for x in s.x), default=0.0)
    if any(0 < at <= end for at in x):
        first = all(s.label != label for s in chart.series)
        chart.series.append(Series(label, x, y, None, dots=True, in_legend=first))
        return
    at, value = next((at, value) for at, value in zip(x, y, strict=True) if at > 0)
    where = number(at, chart.x_unit) + (" tokens" if chart.x_unit == "tokens" else f" {chart.x_unit}")
    note = f"{label}: not drawn, its first value after the start is at {where}, beyond the end of this figure; see Numbers."
    if note not in chart.notes:
        chart.notes.append(note)


def _cell(value: float | None, style: str = "{:.4f}") -> str:
    return "" if value is None else style.format(value)
