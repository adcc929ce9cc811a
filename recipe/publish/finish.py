"""What follows the last step, on rank 0: export, evaluation, model card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recipe import checkpoint
from recipe.config import Config, ConfigError, first_line
from recipe.evaluation.harness import run_harness
from recipe.files import read_json_lines, write_json
from recipe.monitor.metrics import MetricsLog
from recipe.publish.card import write_card
from recipe.publish.export import export_model
from recipe.run_folder import RunFolder


def finish_run(folder: RunFolder, config: Config, tokenizer: Any, rows: np.ndarray, say: Callable[[str], None]) -> None:
    """Export the last checkpoint, evaluate it and write its card.

    An evaluation that fails (no network for its data, say) is reported and leaves the export whole.

    Raises:
        ExportError: if the export does not compute what was trained.
        CheckpointError: if there is no checkpoint.
    """
    newest, skipped = checkpoint.find_newest(folder.checkpoints)
    if newest is None:
        raise checkpoint.CheckpointError("; ".join(skipped) or f"{folder.checkpoints} holds no checkpoint")
    difference = export_model(newest.masters(), config, tokenizer, rows, folder.export)
    say(f"exported {folder.export} from step {newest.step}; reloaded logits differ by at most {difference:.1e}")
    write_card(folder)
    if config.evaluate_tasks == "none":
        return
    try:
        results = run_harness(
            str(folder.export),
            config.evaluate_tasks.split(","),
            data=config.evaluate_data,
            task_folder=folder.evaluation / "tasks",
            limit=config.evaluate_limit,
        )
    except Exception as error:  # the model is trained and exported; an evaluation can be made up for
        say(f"evaluation of {config.evaluate_tasks} failed: {first_line(error)}")
        say(f"later: python scripts/evaluate.py {folder.path} --tasks {config.evaluate_tasks}")
        return
    record_results(folder, results, newest.step, say)
    write_card(folder)


def evaluate_model(
    model: str,
    tasks: list[str],
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    output: Path | None = None,
) -> dict[str, Any]:
    """`scripts/evaluate.py`: evaluate a run (its export; the results join the run and its card) or any model.

    Raises:
        ConfigError: if `model` is a run without an export, or for a bad task or data.
    """
    folder = RunFolder(Path(model))
    is_run = folder.config.is_file()
    if is_run and not (folder.export / "config.json").is_file():
        raise ConfigError(f"{model} has no export yet; let the run finish")
    task_folder = folder.evaluation / "tasks" if is_run else (output or Path("hellaswag.json")).with_suffix(".tasks")
    results = run_harness(str(folder.export) if is_run else model, tasks, data, task_folder, limit, batch_size)
    if is_run:
        step = max(r["step"] for r in read_json_lines(folder.metrics))
        record_results(folder, results, step, print)
        write_card(folder)
    else:
        print_results(results, print)
    if output is not None:
        write_json(output, results)
    return results


def record_results(folder: RunFolder, results: dict, step: int, say: Callable[[str], None]) -> None:
    """Write eval/<task>.json for each task and, for hellaswag, the line of metrics.jsonl; print the numbers."""
    for task, numbers in results["tasks"].items():
        write_json(folder.evaluation / f"{task}.json", {**results, "tasks": {task: numbers}, "step": step})
    if "hellaswag" in results["tasks"]:
        numbers = results["tasks"]["hellaswag"]
        record = {
            "step": step,
            "hellaswag_acc": numbers["acc"],
            "hellaswag_acc_norm": numbers["acc_norm"],
            "hellaswag_n": numbers["n"],
        }
        if record not in read_json_lines(folder.metrics):
            log = MetricsLog(folder.metrics)
            log.write([record])
            log.close()
    print_results(results, say)


def print_results(results: dict, say: Callable[[str], None]) -> None:
    """A line per task, and the command that gives the same numbers."""
    for task, numbers in results["tasks"].items():
        shown = "  ".join(f"{k} {v:.4f} ± {numbers[f'{k}_stderr']:.4f}" for k, v in numbers.items() if f"{k}_stderr" in numbers)
        say(f"{task} ({numbers['n']} items{', ' + results['data'] if results['data'] else ''}): {shown}")
    if results["truncated"]:
        say(f"warning: {results['truncated']} inputs were longer than the model's positions and were cut")
    say(f"the same numbers: {results['command']}")
