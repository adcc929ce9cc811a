"""What follows the last step, on rank 0: export, evaluation, model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from recipe import checkpoint
from recipe.config import Config
from recipe.evaluation.harness import run_harness
from recipe.files import write_json
from recipe.publish.card import write_card
from recipe.publish.export import export_model
from recipe.run_folder import RunFolder, read_metrics


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
    model, difference = export_model(newest.masters(), config, tokenizer, rows, folder.export)
    say(f"exported {folder.export} from step {newest.step}; reloaded logits differ by at most {difference:.1e}")
    write_card(folder)
    if config.evaluate_tasks != "none":
        evaluate_run(folder, model, tokenizer, newest.step, config, say)
        write_card(folder)


def evaluate_run(folder: RunFolder, model: Any, tokenizer: Any, step: int, config: Config, say: Callable[[str], None]) -> None:
    """Evaluate with lm-evaluation-harness; write eval/<task>.json and a line of metrics.jsonl."""
    tasks = [task.strip() for task in config.evaluate_tasks.split(",")]
    try:
        results = run_harness(
            model,
            tasks,
            tokenizer,
            data=config.evaluate_data,
            task_folder=folder.evaluation / "tasks",
            limit=config.evaluate_limit,
        )
    except Exception as error:  # the model is trained and exported; an evaluation can be made up for
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"evaluation of {', '.join(tasks)} failed: {reason}")
        say(f"later: python scripts/evaluate.py {folder.path} --tasks {config.evaluate_tasks}")
        return
    results["command"] = results["command"].replace("pretrained=EXPORT", f"pretrained={folder.export}")
    record_results(folder, results, step, say)


def record_results(folder: RunFolder, results: dict, step: int, say: Callable[[str], None]) -> None:
    """Write eval/<task>.json for each task and, for hellaswag, the line of metrics.jsonl; print the numbers."""
    for task, numbers in results["tasks"].items():
        write_json(folder.evaluation / f"{task}.json", {**results, "tasks": {task: numbers}, "step": step})
        shown = "  ".join(f"{k} {v:.4f} ± {numbers[f'{k}_stderr']:.4f}" for k, v in numbers.items() if f"{k}_stderr" in numbers)
        say(f"{task} ({numbers['n']} items{', ' + results['data'] if results['data'] else ''}): {shown}")
    if "hellaswag" in results["tasks"]:
        numbers = results["tasks"]["hellaswag"]
        record = {
            "step": step,
            "hellaswag_acc": numbers["acc"],
            "hellaswag_acc_norm": numbers["acc_norm"],
            "hellaswag_n": numbers["n"],
        }
        if record not in read_metrics(folder.metrics):
            with open(folder.metrics, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
    if results["truncated"]:
        say(f"warning: {results['truncated']} inputs were longer than the model's positions and were cut")
    say(f"the same numbers: {results['command']}")
