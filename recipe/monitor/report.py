"""report.html: everything that a run folder knows, on one page that needs nothing else, and the figures as PNG files.

Written from the files alone, at any time of the run, by a process that loads no torch.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

from recipe.config import ConfigError, config_fields
from recipe.evaluation.records import metrics_of, scored_items, scores_kind, task_label
from recipe.evaluation.references import COMPLETION_TASK
from recipe.files import write_text
from recipe.monitor import page, png
from recipe.monitor.charts import number
from recipe.monitor.figures import Figures
from recipe.monitor.metrics import format_duration
from recipe.monitor.run_record import RunRecord

PLOTS = "plots"
"""The folder of the PNG files, beside report.html."""
MAX_RUNS = page.NUM_COLOURS
MAX_SAMPLES = 8
"""Times at which samples are shown of one run; of more, evenly spaced ones."""


def write_report(
    paths: list[Path], output: Path | None = None, price_per_hour: float | None = None, llmc: bool = False
) -> Path:
    """Write the report of one or more runs, the first of them being what the others are compared with.

    Args:
        output: the file; report.html in the first run's folder by default.
        price_per_hour: dollars for the whole machine, instead of the runs' own field.
        llmc: draw llm.c's losses also if the text is not known to be FineWeb.
    Raises:
        ConfigError: if one of them is no run, or they are too many to be told apart.
    """
    if len(paths) > MAX_RUNS:
        raise ConfigError(f"{len(paths)} runs are too many for one report; give at most {MAX_RUNS}")
    runs = [RunRecord.read(path) for path in paths]
    output = output or runs[0].path / "report.html"
    report = Report(runs, price_per_hour, llmc)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, report.html())
    png.draw(report.charts(), output.parent / PLOTS)
    return output


def unique_names(runs: list[RunRecord]) -> list[str]:
    """The runs' names, with as much of the path as tells them apart."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [str(run.path) if names.count(run.name) > 1 else run.name for run in runs]


class Report:
    """The page of one or more runs."""

    def __init__(self, runs: list[RunRecord], price_per_hour: float | None = None, llmc: bool = False):
        self.runs, self.names, self._price = runs, unique_names(runs), price_per_hour
        figures = Figures(runs, self.names, llmc)
        trained = any(run.records for run in runs)
        self._losses = figures.losses() if trained else []
        self._hellaswag = figures.hellaswag()
        self._training = figures.training()

    def charts(self) -> list:
        """Those that have anything to show."""
        return [c for c in (*self._losses, *self._hellaswag, *self._training) if any(s.x for s in c.series)]

    def html(self) -> str:
        """The page."""
        single = len(self.runs) == 1
        title = self.names[0] if single else " and ".join(self.names) if len(self.names) == 2 else ", ".join(self.names)
        written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        states = [
            f'<p class="{"bad" if run.state() in ("failed", "gone") else ""}">{escape("" if single else name + ": ")}'
            f"{escape(run.state_line())}</p>"
            for run, name in zip(self.runs, self.names, strict=True)
        ]
        sections = [
            f"<h1>{escape(title)}</h1>",
            *states,
            page.paragraph(f"Written {written} from the files of the run folder{'' if single else 's'}."),
            self._summary(),
            page.section("Differences", *self._differences(), name="differences"),
            page.section("Loss", _grid(self._losses, wide=True), name="loss"),
            page.section("HellaSwag", _grid(self._hellaswag), name="hellaswag"),
            page.section("Evaluations of the export", *self._results(), name="results"),
            page.section("Training", _grid(self._training), name="training"),
            page.section("Starts, skipped steps and saves", *self._events(), name="events"),
            page.section("Time and money", self._cost(), name="cost"),
            page.section("Samples", *self._samples(), name="samples"),
            page.section("Configuration", self._configuration(), name="configuration"),
            page.section("Environment", self._environment(), name="environment"),
        ]
        return page.page(f"{title}: training report", [s for s in sections if s])

    # --- sections ---------------------------------------------------------------------------------------------------

    def _summary(self) -> str:
        if len(self.runs) == 1:
            return page.cards([item for item in summary(self.runs[0], self._price) if item[1]])
        columns = [{name: (value, about) for name, value, about in summary(run, self._price)} for run in self.runs]
        rows = [
            [name, *(f"{value}{f' ({about})' if about and value else ''}" for value, about in (c[name] for c in columns))]
            for name in columns[0]
        ]
        return page.table(["", *self.names], [row for row in rows if any(row[1:])], style="fields")

    def _differences(self) -> list[str]:
        if len(self.runs) == 1:
            return []
        rows = [[name, *map(_text, values)] for name, values in self._field_values() if len(set(map(repr, values))) > 1]
        facts = [_facts(run) for run in self.runs]
        keys = list(dict.fromkeys(key for fact in facts for key in fact))
        differing = [[key, *(fact.get(key, "") for fact in facts)] for key in keys if len({f.get(key) for f in facts}) > 1]
        return [
            page.table(["field", *self.names], rows, "Configuration") or page.paragraph("The configurations are equal."),
            page.table(["", *self.names], differing, "Environment", style="fields"),
            self._same_tokens(),
        ]

    def _same_tokens(self) -> str:
        """Validation losses where all runs have one, after equally many tokens."""
        curves = [{run.tokens_at(r): r["val_loss"] for r in run.having("val_loss")} for run in self.runs]
        common = sorted(set(curves[0]).intersection(*curves[1:]))
        rows = []
        for tokens in common[-8:]:
            first, *others = (curve[tokens] for curve in curves)
            rows.append([f"{tokens:,}", f"{first:.4f}", *(f"{v:.4f} ({v - first:+.4f})" for v in others)])
        return page.table(["tokens", *self.names], rows, "Validation loss after equally many tokens, and against the first run")

    def _results(self) -> list[str]:
        """A table for each style of scoring: on the same weights they differ."""
        harness, completion = [], []
        for run, name in zip(self.runs, self.names, strict=True):
            for record in run.results:
                for task, numbers in record["tasks"].items():
                    of, items = task_label(task, numbers["data"]), f"{numbers.get('n', 0):,}"
                    rows = completion if task == COMPLETION_TASK else harness
                    rows += [[name, of, items, metric, value] for metric, value in metrics_of(numbers)]
        header, error = ["run", "task", "items", "metric", "value"], "; ± is one standard error"
        return [
            page.table(header, harness, f"By lm-evaluation-harness{error}"),
            page.table(header, completion, f"In llm.c's completion style, which compares with no other{error}"),
        ]

    def _events(self) -> list[str]:
        starts, skipped, saves = [], [], []
        for run, name in zip(self.runs, self.names, strict=True):
            starts += [
                [
                    name, s["time"].replace("T", " ").replace("+00:00", " UTC"), f"{s['step']:,}",
                    f"{s['ranks']} × {s['device']}", s["engine"], f"{s['lost_steps']:,}", format_duration(s["lost_seconds"]),
                ]
                for s in run.starts
            ]  # fmt: skip
            known = {r["step"] for r in run.skipped_rows}
            skipped += [
                [
                    name, f"{r['step']:,}", r["reason"], "left out" if r["action"] == "skip" else f"back to {r['to_step']:,}",
                    _text(r.get("loss")), f"{r['rows'][0]:,} to {r['rows'][1]:,}",
                ]
                for r in run.skipped_rows
            ]  # fmt: skip
            skipped += [
                [name, f"{r['step']:,}", "gradient not finite", "left out", _text(r["train_loss"]), ""]
                for r in run.training
                if r["skipped"] and r["step"] not in known
            ]
            if done := run.having("save_seconds"):
                stalls, whole = [r["save_stall_seconds"] for r in done], [r["save_seconds"] for r in done]
                size = f"{done[-1]['save_bytes'] / 1e6:,.1f} MB"
                times = [f"{mean(stalls):.2f} s", f"{max(stalls):.2f} s", f"{mean(whole):.1f} s"]
                saves.append([name, f"{len(done):,}", *times, size])
        none = "" if skipped or not any(run.training for run in self.runs) else "No step was skipped."
        skip_table = page.table(["run", "step", "why", "what", "loss", "rows"], skipped[:200], "Steps that were left out")
        more = f"{len(skipped) - 200:,} more are not shown." if len(skipped) > 200 else ""
        return [
            page.table(["run", "start", "from step", "machine", "engine", "steps lost", "time lost"], starts, "Starts"),
            page.paragraph(none),
            skip_table,
            page.paragraph(more),
            page.table(["run", "saves", "training stood, mean", "longest", "written in, mean", "size"], saves, "Checkpoints"),
        ]

    def _cost(self) -> str:
        rows = []
        for run, name in zip(self.runs, self.names, strict=True):
            rows += [[name, *row] for row in cost(run, self._price)]
        return page.table(["run", "what", "time", "dollars"], rows, _cost_caption(self.runs)) if rows else ""

    def _samples(self) -> list[str]:
        notes, prompts = [], {}
        for run, name in zip(self.runs, self.names, strict=True):
            taken = run.samples
            if len(taken) > MAX_SAMPLES:
                chosen = {round(n * (len(taken) - 1) / (MAX_SAMPLES - 1)) for n in range(MAX_SAMPLES)}
                notes.append(page.paragraph(f"{name}: {MAX_SAMPLES} of {len(taken)} times at which samples were taken."))
                taken = [taken[n] for n in sorted(chosen)]
            whose = f"{name}, " if len(self.runs) > 1 else ""
            for prompt in dict.fromkeys(s["prompt"] for record in taken for s in record["samples"]):
                found = [_sample(f"{whose}step {r['step']:,}", s) for r in taken for s in r["samples"] if s["prompt"] == prompt]
                earlier = page.fold("Earlier, newest first", "\n".join(found[-2::-1]))
                prompts.setdefault(prompt, []).extend([found[-1], earlier])
        return notes + [
            part for prompt, found in prompts.items() for part in (f"<h3>“{escape(prompt)}”, not picked</h3>", *found)
        ]

    def _field_values(self) -> list[tuple[str, list[Any]]]:
        """The fields that are known and those that the files have beside them."""
        names = dict.fromkeys([*config_fields(), *(name for run in self.runs for name in run.fields)])
        return [
            (name, [run.fields.get(name) for run in self.runs])
            for name in names
            if name not in ("dry_run", "output_dir") and any(name in run.fields for run in self.runs)
        ]

    def _configuration(self) -> str:
        rows = [[name, *map(_text, values)] for name, values in self._field_values()]
        body = page.table(["field", *self.names], rows, style="fields")
        return page.fold("All fields", body) if len(self.runs) > 1 else body

    def _environment(self) -> str:
        facts = [_facts(run) for run in self.runs]
        keys = dict.fromkeys(key for fact in facts for key in fact)
        return page.table(["", *self.names], [[key, *(f.get(key, "") for f in facts)] for key in keys], style="fields")


def summary(run: RunRecord, price_per_hour: float | None) -> list[tuple[str, str, str]]:
    """Name, value and a word about it of what matters most; the value is empty where it is not known."""
    training, validation = run.training, run.having("val_loss")
    last, plan = (training[-1] if training else {}), run.plan
    dollars = run.dollars(run.seconds, price_per_hour)
    lost = sum(s["lost_steps"] for s in run.starts)
    steps = f"{last['step']:,} of {plan.max_steps:,} steps" if last and plan else ""
    best = min(validation, key=lambda r: r["val_loss"]) if validation else {}
    end = validation[-1] if validation else {}
    items = [
        ("Parameters", f"{run.parameters / 1e6:,.1f}M", f"{run.config.n_layer} layers, width {run.config.n_embd}"),
        ("Tokens", number(last["tokens"], "tokens") if last else "", steps),
        ("Validation loss", f"{end['val_loss']:.4f}" if end else "", f"at step {end['step']:,}" if end else ""),
        ("Best", f"{best['val_loss']:.4f}" if best and best is not end else "", f"at step {best['step']:,}" if best else ""),
    ]
    if end.get("val_bits_per_byte"):
        items.append(("Bits a byte", f"{end['val_bits_per_byte']:.4f}", "of the validation text"))
    else:
        items.append(("Bits a byte", "", ""))
    for style, field in (("lm-eval", "hellaswag_acc_norm"), ("completion", "hellaswag_completion_acc_norm")):
        scores = run.newest_scores(field)
        own = "of our own " if scores and scores_kind(scores, run.config.evaluate_data) == "mini" else ""
        about = f"acc_norm, {scored_items(scores):,} {own}items" if scores else ""
        items.append((f"HellaSwag, {style}", f"{scores[field]:.4f}" if scores else "", about))
    speeds = [r["tokens_per_second"] for r in training]
    shares = [(r["mfu"], r["step_seconds"]) for r in training if r.get("mfu") is not None]
    seconds = sum(r["step_seconds"] for r in training)
    waited = sum(r["data_wait_fraction"] * r["step_seconds"] for r in training)
    memory = [r["gpu_memory_gib"] for r in training if r.get("gpu_memory_gib") is not None]
    clock = "wall clock" if run.has_wall_clock else "of training steps"
    own = f", from step {run.begun_at:,} on" if run.begun_at else ""
    items += [
        ("Speed", f"{number(median(speeds), 'tokens')} tok/s" if speeds else "", "median of the steps"),
        ("MFU", f"{median(m for m, _ in shares):.1%}" if shares else "", "causal, median"),
        ("Waiting for data", f"{waited / seconds:.2%}" if seconds else "", "of the steps' time"),
        ("GPU memory", f"{max(memory):.1f} GiB" if memory else "", "peak of rank 0"),
        ("Time", format_duration(run.seconds) if training else "", f"{clock}{own}"),
        ("Money", "" if dollars is None else f"${dollars:,.2f}", "so far" if run.state() == "running" else ""),
        ("Skipped steps", f"{sum(r['skipped'] for r in training):,}" if training else "", ""),
        ("Restarts", f"{len(run.starts) - 1:,}" if run.starts else "", f"{lost:,} steps done again" if lost else ""),
    ]
    return items


def cost(run: RunRecord, price_per_hour: float | None) -> list[list[str]]:
    """Rows of what took how long and cost what."""
    if not run.training:
        return []

    def row(what: str, seconds: float) -> list[str]:
        dollars = run.dollars(seconds, price_per_hour)
        return [what, format_duration(seconds), "" if dollars is None else f"{dollars:,.2f}"]

    steps = sum(r["step_seconds"] for r in run.training)
    lost = sum(s["lost_seconds"] for s in run.starts)
    rows = [row("training steps", steps)]
    if run.has_wall_clock:
        rows += [row("steps that were lost", lost)] if lost else []
        rows += [row("set-up, evaluations, saves, rest", max(0.0, run.seconds - steps - lost)), row("in all", run.seconds)]
    tokens = run.own_tokens
    rows.append(row("a billion tokens", run.seconds * 1e9 / tokens))
    left = run.plan.total_tokens - run.training[-1]["tokens"] if run.plan else 0
    if left > 0:
        whole = f"all from step {run.begun_at:,} on" if run.begun_at else "the whole run"
        rows.append(row(f"{whole}, at the rate so far", run.seconds * (tokens + left) / tokens))
    return rows


def _cost_caption(runs: list[RunRecord]) -> str:
    caption = "Up to the last line of metrics.jsonl"
    if not all(run.has_wall_clock for run in runs):
        caption += "; of runs whose records have no wall clock, training steps alone"
    if all(run.config.price_per_hour is None for run in runs):
        caption += "; dollars need price_per_hour"
    if any(len(run.machines) > 1 for run in runs):
        caption += "; a run on several machines has no dollars, since one price cannot fit them"
    if any(run.begun_at for run in runs):
        caption += "; of a run that branched off another one, its own part alone"
    return caption


def _grid(charts: list, wide: bool = False) -> str:
    figures = [f for chart in charts if (f := page.figure(chart))]
    return f'<div class="charts{" wide" if wide else ""}">\n' + "\n".join(figures) + "\n</div>" if figures else ""


def _sample(where: str, one: dict[str, str]) -> str:
    kinds = [(where, "continuation"), (f"{where}, greedy", "greedy")]
    return "\n".join(
        f"{page.paragraph(words)}<blockquote><b>{escape(one['prompt'])}</b>{escape(_short(one[kind]))}</blockquote>"
        for words, kind in kinds
        if one.get(kind)
    )


def _short(text: str) -> str:
    """A text whose runs of empty lines, which little-trained models like, are told rather than shown."""
    return re.sub(r"\n{4,}", lambda lines: f"\n[{len(lines[0]) - 1} empty lines]\n", text)


def _facts(run: RunRecord) -> dict[str, str]:
    """environment.json, flat."""
    environment = run.environment
    if not environment:
        return {}
    facts = {
        "command": " ".join(environment.get("command", [])),
        "machine": run.machine,
        **{key: _text(environment[key]) for key in ("engine", "precision", "text", "commit", "python") if key in environment},
        **{name: _text(value) for name, value in environment.get("hardware", {}).items()},
        **environment.get("versions", {}),
    }
    return {key: value for key, value in facts.items() if value}


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
