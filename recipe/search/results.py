"""The results file: one JSON line a finished or failed run of the search, made from its run folder."""

from __future__ import annotations

import json
import os
import signal
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipe.config import NOT_PART_OF_THE_RUN, ConfigError
from recipe.files import read_json, read_json_lines
from recipe.search.trials import TEXT_FIELDS, Job, Stage, Trial

Record = dict[str, Any]
"""Fields of a line: stage, name, group, seed, kind, budget and state (finished or failed, with reason), base and overrides;
steps, tokens and curve, a list of [step, tokens, val_loss], from the beginning of training, for a branch with the stable part;
val_loss at the end; start_step, from where it trained itself; tokens_per_second, the median over its steps; train_seconds, of
the steps from the beginning of training; own_tokens, own_train_seconds and wall_seconds of this run alone; side_by_side, the
most runs that the search had at once while this one went on, itself among them, for on a CPU they slow each other down (old
results are without it: their runs were alone); epochs of the text; hellaswag_... at the end, if it was evaluated; text and
validation_sha256, micro_batch_size, precision, versions, device, commit and date."""


def key_of(record: Record) -> tuple[str, str, int, str, int]:
    """As Job.key."""
    return record["stage"], record["name"], record["seed"], record["kind"], record["budget"]


def read_results(path: Path) -> dict[tuple[str, str, int, str, int], Record]:
    """The records by key. Of several with one key the last counts, but a failure never replaces a result.

    Raises:
        ConfigError: for a file of something else.
    """
    records: dict = {}
    for record in read_json_lines(path):
        try:
            key = key_of(record)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"results: {path} holds a line without {error}; it is not a file of results") from error
        if record["state"] == "finished" or records.get(key, record)["state"] != "finished":
            records[key] = record
    return records


def append(path: Path, record: Record) -> None:
    """Add a line, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(("\n" if cut_off else "") + json.dumps(record, ensure_ascii=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def check_unchanged(stages: Iterable[Stage], records: dict) -> None:
    """Refuse results of trials that have been edited since.

    Raises:
        ConfigError: naming the trials and the fields.
    """
    problems = []
    trials = {(trial.stage, trial.name): (stage.file, trial) for stage in stages for trial in stage.trials}
    for record in records.values():
        file, trial = trials.get((record["stage"], record["name"]), (None, None))
        if trial is None:
            continue
        now, then = overrides_of(trial), record["overrides"]
        differing = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        if differing:
            fields = "; ".join(f"{name} is {then.get(name)} there and {now.get(name)} here" for name in differing)
            problems.append(f"{file}: {trial.name}: the results hold it with other fields: {fields}; give it another name")
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def overrides_of(trial: Trial) -> dict[str, Any]:
    """The fields that make a trial what it is, as its configuration reads them."""
    config, _ = trial.config(trial.budgets[0], trial.seeds[0])
    return {
        name: getattr(config, name)
        for name in trial.fields
        if name not in NOT_PART_OF_THE_RUN and name not in TEXT_FIELDS and hasattr(config, name)
    }


def make_record(
    job: Job,
    folder: Path,
    exit_code: int,
    wall_seconds: float,
    stable: Record | None,
    log: Path,
    text_tokens: int | None = None,
    side_by_side: int = 1,
) -> Record:
    """What the run of a job in `folder` has come to.

    Args:
        exit_code: of its process; negative for a signal.
        stable: the record of the stable part that a branch has left.
        log: what the run has printed.
        text_tokens: of one pass over the text, if known.
        side_by_side: how many runs there were at once.
    """
    environment = read_json(folder / "environment.json")
    status = read_json(folder / "status.json")
    metrics = read_json_lines(folder / "metrics.jsonl")
    training = [r for r in metrics if "train_loss" in r]
    validation = [r for r in metrics if r.get("val_loss") is not None]
    curve = [[r["step"], r["tokens"], r["val_loss"]] for r in validation]
    before = [point for point in stable["curve"] if point[0] <= job.start] if stable else []
    own_seconds = _own_seconds(training)
    plan = job.trial.plan(job.budget or job.trial.budgets[-1])
    own_tokens = training[-1]["tokens"] - plan.tokens_after(training[0]["step"] - 1) if training else 0
    earlier = _seconds_before(job, stable)
    finished = exit_code == 0 and status.get("state") == "finished" and bool(curve)
    hardware = environment.get("hardware", {})
    record: Record = {
        "stage": job.trial.stage,
        "name": job.trial.name,
        "group": job.trial.group,
        "seed": job.seed,
        "kind": job.kind,
        "budget": job.budget,
        "state": "finished" if finished else "failed",
        "base": Path(job.trial.base).name,
        "overrides": overrides_of(job.trial),
        "start_step": job.start,
        "steps": training[-1]["step"] if training else 0,
        "tokens": training[-1]["tokens"] if training else 0,
        "epochs": round(training[-1]["tokens"] / text_tokens, 3) if training and text_tokens else None,
        "curve": before + curve,
        "val_loss": curve[-1][2] if finished else None,
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in training) if training else None,
        "train_seconds": None if earlier is None else round(earlier + own_seconds, 2),
        "own_tokens": own_tokens,
        "own_train_seconds": round(own_seconds, 2),
        "wall_seconds": round(wall_seconds, 2),
        "side_by_side": side_by_side,
        "first_step_seconds": training[0]["step_seconds"] if training else None,
        "text": environment.get("text"),
        "validation_sha256": environment.get("validation_sha256"),
        "micro_batch_size": environment.get("micro_batch_size"),
        "precision": environment.get("precision"),
        "versions": environment.get("versions", {}),
        "device": hardware.get("gpu", hardware.get("cpu")),
        "commit": environment.get("commit"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if not finished:
        record["reason"] = _reason(status, exit_code, log)
    scored = [r for r in metrics if "hellaswag_acc" in r]
    if finished and scored and scored[-1]["step"] == record["steps"]:
        record |= {name: value for name, value in scored[-1].items() if name.startswith("hellaswag_")}
    return record


def _own_seconds(training: list[dict]) -> float:
    """Of the steps; the first, which compiles, counts as the median of the others at most."""
    seconds = [r["step_seconds"] for r in training]
    if len(seconds) > 1:
        seconds[0] = min(seconds[0], statistics.median(seconds[1:]))
    return sum(seconds)


def _seconds_before(job: Job, stable: Record | None) -> float | None:
    """Training seconds of the stable part up to where a branch leaves it, of its whole time in proportion to the tokens."""
    if job.kind != "branch":
        return 0.0
    if not stable or not stable["own_tokens"]:
        return None
    plan = job.trial.plan(job.budget)
    return stable["own_train_seconds"] * plan.tokens_after(job.start) / stable["own_tokens"]


def _reason(status: dict, exit_code: int, log: Path) -> str:
    if status.get("state") == "failed" and status.get("reason"):
        return status["reason"]
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"exit code {exit_code}: {said[-1] if said else 'nothing was printed'}"
