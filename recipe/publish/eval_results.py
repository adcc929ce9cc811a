"""Evaluations of an export: as files `.eval_results/*.yaml` for the Hub, and in the metadata of the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry
from huggingface_hub._eval_results import eval_result_entries_to_yaml

from recipe.evaluation.references import COMPLETION_TASK
from recipe.files import write_text

_HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"


def write_eval_results(records: list[dict[str, Any]], export: Path, versions: dict[str, str]) -> None:
    """Write export/.eval_results/TASK.yaml for each task that was measured on all items of its dataset on the Hub."""
    folder = export / ".eval_results"
    for task, metric, value, numbers in _publishable(records):
        stderr = numbers[f"{metric}_stderr"]
        entry = EvalResultEntry(
            dataset_id=numbers["data"]["name"],
            task_id=task,
            value=value,
            dataset_revision=numbers["data"]["revision"],
            source_url=_HARNESS,
            source_name="lm-evaluation-harness",
            notes=f"{metric}, zero-shot, standard error {stderr:.4f}, {numbers['n']:,} items, lm_eval {versions['lm_eval']}",
        )
        folder.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        write_text(folder / f"{task}.yaml", text)


def card_results(records: list[dict[str, Any]]) -> list[EvalResult]:
    """The same for the card's metadata (`model-index`)."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=numbers["data"]["name"],
            dataset_name=task,
            dataset_revision=numbers["data"]["revision"],
            metric_type=metric,
            metric_value=round(value, 6),
            metric_name=f"{metric} (lm-evaluation-harness, zero-shot)",
        )
        for task, metric, value, numbers in _publishable(records)
    ]


def _publishable(records: list[dict[str, Any]]) -> list[tuple[str, str, float, dict[str, Any]]]:
    found = []
    for record in records:
        for task, numbers in record["tasks"].items():
            metric = next((name for name in ("acc_norm", "acc") if f"{name}_stderr" in numbers), None)
            whole = numbers["data"]["kind"] == "whole" and numbers["data"]["name"]  # a task may have no dataset
            if whole and metric and task != COMPLETION_TASK:
                found.append((task, metric, numbers[metric], numbers))
    return found
