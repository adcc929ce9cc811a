"""docs/recipe.md's tables and figures from the results; the prose around them is left as it is."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from recipe.config import ConfigError
from recipe.estimate import FIT_SOURCE
from recipe.files import write_text
from recipe.plan import GPT2_VOCAB_SIZE, count_parameters
from recipe.search.comparison import (
    CANDIDATE,
    FINEWEB_LOSS,
    GAIN_BUDGET,
    GAIN_GOAL,
    GOALS,
    LLMC_TOKENS,
    End,
    Fit,
    Prediction,
    Ratio,
    ends_of,
    fit_group,
    literature_floor,
    noise_of,
    predict,
    ratios_of,
    trained,
)
from recipe.search.figures import draw_gains, draw_losses
from recipe.search.results import Record, check_unchanged, key_of, read_results
from recipe.search.statistics import INTERVAL, Gain, Noise, Reached, gain
from recipe.search.trials import GROUPS, Stage, Trial, jobs_of, show_tokens

VERDICTS = {True: "met", False: "missed", None: "open"}
"""Of a goal; open where longer runs may meet it."""
SECTIONS = ("noise", "gains", "comparison", "fit", "prediction", "trials", "failures")
"""Of the document: what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced."""


def write_report(stages: list[Stage], results: Path, document: Path, prices: dict[str, float]) -> list[Path]:
    """Replace the tables of the document, and draw its figures into a folder named like it beside it.

    Args:
        prices: dollars an hour by machine, for the prediction.
    Returns:
        the files that were written.
    Raises:
        ConfigError: if there are no results, they do not compare, or the document lacks a marker.
    """
    records = list(read_results(results).values())
    if not records:
        raise ConfigError(f"results: {results} holds none; run the trials first")
    check_unchanged(stages, read_results(results))
    text = _read_document(document)
    figures = document.with_suffix("")
    runs = trained(records)
    noise = noise_of(runs)
    written: list[Path] = []
    parts = dict.fromkeys(SECTIONS, "")
    parts["noise"] = _noise_text(noise)
    parts["trials"] = _trials_table(records)
    parts["failures"] = _failures_table(records)
    for stage in stages:
        if stage.compare == "trials" and (found := gains_of(stage, runs, noise)):
            picture = figures / f"gains-{stage.name}.png"
            draw_gains(stage.name, [(name, one) for name, _, _, one in found], picture)
            written.append(picture)
            parts["gains"] += _gains_table(stage, found, runs, f"{figures.name}/{picture.name}")
    compared = {stage.name for stage in stages if stage.compare == "groups"}
    ends = ends_of(r for r in runs if r["stage"] in compared)
    if ends:
        fits, notes = _fits(ends, noise, stages)
        ratios = ratios_of(ends)
        picture = figures / "losses.png"
        draw_losses(ends, _best_fits(fits), picture)
        written.append(picture)
        parts["comparison"] = _comparison(ends, ratios, noise, f"{figures.name}/{picture.name}")
        parts["fit"] = _fit_table(fits, notes)
        base = next((t.base for s in stages if s.compare == "groups" for t in s.trials if t.group == CANDIDATE), None)
        if base:
            parts["prediction"] = _prediction_table(_predictions(fits, ratios, base, prices))
    for name, content in parts.items():
        text = _replace(text, name, content or "No results yet.\n", document)
    write_text(document, text)
    return [document, *written]


def gains_of(stage: Stage, runs: list[Record], noise: Noise | None) -> list[tuple[str, int, list[float], Gain]]:
    """Of the trials of a stage over its baseline, in their order: name, budget, losses and gain."""
    losses: dict[tuple[str, int], list[float]] = {}
    for r in runs:
        losses.setdefault((_trial(r), r["budget"]), []).append(r["val_loss"])
    found = []
    for trial in stage.trials:
        own = f"{trial.stage}/{trial.name}"
        for budget in trial.budgets:
            candidate, baseline = losses.get((own, budget)), losses.get((stage.baseline, budget))
            if candidate and baseline and own != stage.baseline:
                name = trial.name if len(trial.budgets) == 1 else f"{trial.name}, {show_tokens(budget)}"
                found.append((name, budget, candidate, gain(baseline, candidate, noise)))
    return found


# --- the document -----------------------------------------------------------------------------------------------------


def _read_document(document: Path) -> str:
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"report: {document} cannot be read: {error.strerror}; name docs/recipe.md") from error
    missing = [name for name in SECTIONS if not section_pattern(name).search(text)]
    if missing:
        raise ConfigError(f"report: {document} lacks <!-- begin {missing[0]} --> and <!-- end {missing[0]} -->; put them back")
    return text


def section_pattern(name: str) -> re.Pattern[str]:
    """A section with its markers, which are its groups."""
    return re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)


def _replace(text: str, name: str, content: str, document: Path) -> str:
    return section_pattern(name).sub(lambda match: f"{match[1]}\n{content.strip()}\n\n{match[2]}", text)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *[[str(cell).replace("|", "\\|") for cell in row] for row in rows]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- the sections -----------------------------------------------------------------------------------------------------


def _noise_text(noise: Noise | None) -> str:
    if noise is None:
        return "No recipe has been run with two seeds yet: no verdict is possible.\n"
    return (
        f"Standard deviation of the final validation loss over equal runs: **{noise.deviation:.4f} nats** "
        f"({noise.freedom} degrees of freedom, pooled over all recipes that were run more than once).\n"
    )


def _gains_table(stage: Stage, found: list[tuple[str, int, list[float], Gain]], runs: list[Record], picture: str) -> str:
    rows = [
        (
            name, show_tokens(budget), len(losses), f"{sum(losses) / len(losses):.4f}", f"{one.mean:+.4f}",
            "" if one.margin is None else f"±{one.margin:.4f}", one.verdict,
        )
        for name, budget, losses, one in found
    ]  # fmt: skip
    table = _table(("trial", "budget", "seeds", "final loss", "gain, nats", "noise", "verdict"), rows)
    ends = ", ".join(
        f"{statistics.fmean(losses):.4f} after {show_tokens(budget)} ({len(losses)} seed{'s' * (len(losses) > 1)})"
        for budget in sorted({budget for _, budget, _, _ in found})
        if (losses := [r["val_loss"] for r in runs if _trial(r) == stage.baseline and r["budget"] == budget])
    )
    made = {key_of(r) for r in runs}
    jobs = [job.key for trial in stage.trials for job in jobs_of(trial) if job.kind != "stable"]
    left = sum(key not in made for key in jobs)
    missing = f" {left} of the stage's {len(jobs)} runs are missing." if left else ""
    return (
        f"### {stage.name}: over {stage.baseline}\n\nThe baseline ends at {ends}.{missing}\n\n{table}\n"
        f"![{stage.name}: gains over the baseline]({picture})\n\n"
    )


def _trial(record: Record) -> str:
    return f"{record['stage']}/{record['name']}"


def _comparison(ends: dict[str, list[End]], ratios: list[Ratio], noise: Noise | None, picture: str) -> str:
    rows = [
        (
            group, end.name, show_tokens(end.budget), len(end.losses), f"{end.loss:.4f}", f"{end.tokens / end.speed:,.0f}",
            f"{end.speed:,.0f}",
        )
        for group in GROUPS
        for end in ends.get(group, ())
    ]  # fmt: skip
    header = ("recipe", "trial", "budget", "seeds", "final loss", "training, s", "tokens/s")
    text = _table(header, rows) + f"\n![Validation loss against tokens]({picture})\n\n"
    text += "What the fast recipe needs for a baseline's final loss:\n\n"
    text += _table(
        (
            "baseline", "budget", "its loss", "tokens, by ends of runs", "tokens, along a run", "share of tokens",
            "share of time", "goal", "",
        ),
        (
            (
                r.baseline, show_tokens(r.end.budget), f"{r.end.loss:.4f}", _tokens(r.ends), _tokens(r.along),
                _share(r, r.tokens), _share(r, r.seconds), f"{GOALS[r.baseline]:.0%}", VERDICTS[r.meets_goal],
            )
            for r in ratios
        ),
    )  # fmt: skip
    return text + "\nAt equal tokens:\n\n" + _equal_tokens(ends, noise)


def _equal_tokens(ends: dict[str, list[End]], noise: Noise | None) -> str:
    rows = []
    fast = {end.budget: end for end in ends.get(CANDIDATE, ())}
    for group in (g for g in GROUPS if g != CANDIDATE):
        for end in ends.get(group, ()):
            if end.budget in fast:
                one = gain(end.losses, fast[end.budget].losses, noise)
                goal = group == "llmc" and end.budget == GAIN_BUDGET
                met = "" if not goal else f"goal {GAIN_GOAL}: {'met' if one.mean >= GAIN_GOAL else 'missed'}"
                margin = "" if one.margin is None else f"±{one.margin:.4f}"
                rows.append((group, show_tokens(end.budget), f"{one.mean:+.4f}", margin, one.verdict, met))
    return _table(("baseline", "budget", "gain of the fast recipe, nats", "noise", "verdict", ""), rows)


def _tokens(reached: Reached) -> str:
    if reached.tokens is None:
        return ""
    return f"{reached.bound} {show_tokens(reached.tokens)}".strip()


def _share(ratio: Ratio, value: float | None) -> str:
    return "" if value is None else f"{ratio.reached.bound} {value:.0%}".strip()


def _fits(ends: dict[str, list[End]], noise: Noise | None, stages: list[Stage]) -> tuple[list[Fit], list[str]]:
    """Of each recipe with a fitted floor, if there are budgets enough, and with the literature's."""
    floor = literature_floor(_parameters(stages))
    fits, notes = [], []
    for group in (g for g in GROUPS if g in ends):
        found = [fit for f in (None, floor) if (fit := fit_group(group, ends[group], noise, f))]
        fits += found
        if not any(fit.given_floor is None for fit in found):
            notes.append(f"{group}: its {len(ends[group])} budgets do not determine E.")
        if not any(fit.given_floor is not None for fit in found):
            notes.append(f"{group}: no fit with a given E, for it has fewer than two budgets or losses below {floor:.3f}.")
    return fits, notes


def _parameters(stages: list[Stage]) -> int:
    trial: Trial = next(t for s in stages if s.compare == "groups" for t in s.trials)
    return count_parameters(trial.config(trial.budgets[0], trial.seeds[0])[0], GPT2_VOCAB_SIZE)


def _best_fits(fits: list[Fit]) -> list[Fit]:
    """One a group: with a fitted floor where there is one."""
    return list({fit.group: fit for fit in reversed(fits)}.values())


def _fit_table(fits: list[Fit], notes: list[str]) -> str:
    percent = f"{INTERVAL[0]}% to {INTERVAL[1]}%"
    rows = [
        (
            fit.group, fit.budgets, f"{fit.law.floor:.3f}" + (" (given)" if fit.given_floor is not None else ""),
            "" if fit.given_floor is not None else _spread(fit, "floor"), f"{fit.law.scale:.3g}", f"{fit.law.exponent:.3f}",
            _spread(fit, "exponent"), "" if fit.deviation is None else f"{fit.deviation:.4f}",
        )
        for fit in fits
    ]  # fmt: skip
    header = ("recipe", "budgets", "E", percent, "A", "b", percent, "deviation, nats")
    table = _table(header, rows) if rows else ""
    given = next((fit.given_floor for fit in fits if fit.given_floor is not None), None)
    if given is not None:
        notes = [*notes, f"A given E of {given:.3f} is that of a model of this size by {FIT_SOURCE}: an assumption."]
    return table + "".join(f"\n{note}\n" for note in notes)


def _spread(fit: Fit, of: str) -> str:
    spread = fit.spread(of)
    return "" if spread is None else f"{spread[0]:.3f} to {spread[1]:.3f}"


def _predictions(fits: list[Fit], ratios: list[Ratio], base: str, prices: dict[str, float]) -> list[Prediction]:
    found: list[Prediction] = []
    for free in (True, False):
        pair = {fit.group: fit for fit in fits if (fit.given_floor is None) == free}
        found += predict(ratios if free else [], pair.get(CANDIDATE), pair.get("llmc"), base, prices)
    return found


def _prediction_table(predictions: list[Prediction]) -> str:
    machines = [name for name, _ in next((p.costs for p in predictions if p.costs), [])]
    rows = []
    for p in predictions:
        between = "" if p.low is None else f"{_many(p.low)} to {_many(p.high)}"
        costs = [f"{60 * e.hours:,.0f} min, {e.dollars:,.0f} dollars" for _, e in p.costs] or ["out of range"] * len(machines)
        rows.append((p.basis, _many(p.tokens), between, *costs))
    percent = f"{INTERVAL[0]}% to {INTERVAL[1]}%"
    header = ("predicted by", "tokens, predicted", percent, *(f"{name}, predicted" for name in machines))
    speeds = [
        f"{name}: {e.tokens_per_second:,.0f} tokens/s ({e.basis}), {e.dollars / e.hours:g} dollars an hour"
        for name, e in next((p.costs for p in predictions if p.costs), [])
    ]
    return (
        f"Predicted, not measured, for FineWeb validation loss {FINEWEB_LOSS}, which llm.c's run of "
        f"{show_tokens(LLMC_TOKENS)} tokens ends a little below.\n\n{_table(header, rows)}\n{'; '.join(speeds)}.\n"
    )


def _many(tokens: float) -> str:
    return show_tokens(tokens) if tokens < 1e13 else "more than 10T"


def _trials_table(records: list[Record]) -> str:
    rows = []
    for r in sorted(records, key=lambda r: r["stage"]):
        if r["kind"] == "stable" or r["state"] != "finished":
            continue
        same = [other["overrides"] for other in records if other["stage"] == r["stage"]]
        own = {k: v for k, v in r["overrides"].items() if any(o.get(k) != v for o in same)}
        hellaswag = f"{r['hellaswag_acc_norm']:.4f}" if "hellaswag_acc_norm" in r else ""
        if "hellaswag_acc_norm_stderr" in r:
            hellaswag += f" ± {r['hellaswag_acc_norm_stderr']:.4f}"
        completion = f"{r['hellaswag_completion_acc_norm']:.4f}" if "hellaswag_completion_acc_norm" in r else ""
        if "hellaswag_completion_acc_norm_stderr" in r:
            completion += f" ± {r['hellaswag_completion_acc_norm_stderr']:.4f}"
        rows.append(
            (
                r["stage"], r["name"], r["seed"], show_tokens(r["tokens"]), "" if r["epochs"] is None else f"{r['epochs']:.2f}",
                f"{r['val_loss']:.4f}", f"{r['tokens_per_second']:,.0f}",
                "" if r["train_seconds"] is None else f"{r['train_seconds']:,.0f}", f"{r['wall_seconds']:,.0f}", hellaswag,
                completion, ", ".join(f"{k} {_value(v)}" for k, v in own.items()), r["device"], (r["commit"] or "")[:9],
                r["date"][:10],
            )
        )  # fmt: skip
    header = (
        "stage", "trial", "seed", "tokens", "epochs", "final loss", "tokens/s", "training, s", "run, s", "HellaSwag, lm-eval",
        "HellaSwag, completion", "fields that differ within the stage", "device", "commit", "date",
    )  # fmt: skip
    kept = [n for n in range(len(header)) if n not in (4, 9, 10) or any(row[n] for row in rows)]
    return _table([header[n] for n in kept], [[row[n] for n in kept] for row in rows]) if rows else ""


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _failures_table(records: list[Record]) -> str:
    rows = [
        (r["stage"], r["name"], r["seed"], r["kind"], show_tokens(r["budget"]), r["steps"], r["reason"])
        for r in records
        if r["state"] == "failed"
    ]
    return _table(("stage", "trial", "seed", "run", "budget", "step", "reason"), rows) if rows else "None.\n"
