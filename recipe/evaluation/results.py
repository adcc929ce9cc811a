"""Results of an evaluation: kept with the run, printed, read again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe.config import ConfigError, first_line
from recipe.distributed import Distributed
from recipe.evaluation.records import KINDS, metrics_of, read_results
from recipe.evaluation.references import COMPLETION_TASK
from recipe.evaluation.suite import evaluate
from recipe.files import read_json_lines, write_json
from recipe.monitor.metrics import MetricsLog
from recipe.run_folder import RunFolder, model_of


def results_of(model: str, tasks: list[str], data: str | None, limit: int | None, batch_size: int) -> dict[str, Any]:
    """The results of a model or a run, computed here; or those that a .json file holds.

    Raises:
        ConfigError: if they cannot be had, or lack the items of a task.
    """
    if not model.endswith(".json"):
        with tempfile.TemporaryDirectory() as folder:
            return evaluate(model_of(model), tasks, Distributed.alone(), data, Path(folder), limit, batch_size)
    try:
        results = json.loads(Path(model).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model} cannot be read: {first_line(error)}") from error
    for task in tasks:
        if not results.get("items", {}).get(task):
            raise ConfigError(f"{model} holds no items of {task}; write it with scripts/evaluate.py --tasks {task} --output")
    return results


def record_results(folder: RunFolder, results: dict, step: int, say: Callable[[str], None]) -> None:
    """Write eval/<task>.json for each task and, for HellaSwag, the line of metrics.jsonl; print the numbers.

    What is of a lesser kind than the results that are there goes to eval/<task>-<kind>.json instead.
    """
    known = read_results(folder.evaluation)
    for task, numbers in results["tasks"].items():
        kind = numbers["data"]["kind"]
        kept = [record["tasks"][task]["data"]["kind"] for record in known if task in record["tasks"]]
        name = task if all(KINDS.index(kind) <= KINDS.index(other) for other in kept) else f"{task}-{kind}"
        items = {task: results["items"].get(task, [])}
        write_json(folder.evaluation / f"{name}.json", {**results, "tasks": {task: numbers}, "items": items, "step": step})
    for task in ("hellaswag", COMPLETION_TASK):
        if task not in results["tasks"]:
            continue
        numbers = results["tasks"][task]
        record = {"step": step, "hellaswag_n": numbers["n"], "hellaswag_kind": numbers["data"]["kind"]}
        record |= {f"{task}_{name}": numbers[name] for name in ("acc", "acc_norm", "acc_norm_stderr") if name in numbers}
        if record not in read_json_lines(folder.metrics):
            log = MetricsLog(folder.metrics)
            log.write([record])
            log.close()
    print_results(results, say)


def print_results(results: dict, say: Callable[[str], None]) -> None:
    """A line per task, and the command that gives the same numbers."""
    for task, numbers in results["tasks"].items():
        shown = "  ".join(f"{name} {value}" for name, value in metrics_of(numbers))
        say(f"{task} ({numbers['n']} items): {shown}")
    if results["truncated"]:
        say(f"warning: {results['truncated']} inputs were longer than the model's positions and were cut")
    if results["command"]:
        say(f"the same numbers: {results['command']}")
