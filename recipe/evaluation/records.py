"""What is written down of an evaluation, and how it is told: of which items a number is says whether it compares with another.
Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe.evaluation.items import MINI
from recipe.evaluation.references import HELLASWAG_ITEMS
from recipe.files import read_json

KINDS = ("whole", "copy", "part", "mini")
"""What a number is of, the best first: all items of the set on the Hub; a local file of as many; fewer, or a local file of
another size; the package's own 64, which are no HellaSwag. Noted as `hellaswag_kind` in metrics.jsonl and as `kind` of a task's
data in eval/*.json."""
COMPARABLE = ("whole", "copy")
"""The kinds that stand beside published numbers."""


def data_kind(data: str | None, n: int, limit: int | None) -> str:
    """The kind of what has been evaluated.

    Args:
        data: as in `read_items`, or the name of a local file; None for the Hub's.
        n: items that were scored.
        limit: how many were asked for; None for all.
    """
    if data is None:
        return "whole" if limit is None or n == HELLASWAG_ITEMS else "part"
    if data == "mini" or Path(data).name == MINI.name:
        return "mini"
    return "copy" if n == HELLASWAG_ITEMS else "part"


def scores_kind(record: dict[str, Any], data: str | None) -> str:
    """The kind of HellaSwag's numbers in a line of metrics.jsonl; of older runs, which do not say it, what their
    `evaluate_data` and the number of items tell."""
    items = scored_items(record)
    return record.get("hellaswag_kind") or data_kind(data, items, limit=items)


def scored_items(record: dict[str, Any]) -> int:
    """How many of HellaSwag's items a line of metrics.jsonl is of; those of old runs that do not say it were all."""
    return record.get("hellaswag_n", record.get("hellaswag_completion_n", HELLASWAG_ITEMS))


def precedence(record: dict[str, Any], data: str | None) -> tuple[int, int]:
    """Which of several lines with HellaSwag's numbers stands for a run, the greatest: the newest step's, and of one step the
    best kind. Arguments as for `scores_kind`."""
    return record["step"], -KINDS.index(scores_kind(record, data))


def read_results(evaluation: Path) -> list[dict[str, Any]]:
    """The records of RUN/eval/*.json, one task each, without one cut off by a crash; each says of which items it is."""
    records = [record for path in sorted(evaluation.glob("*.json")) if "tasks" in (record := read_json(path))]
    for record in records:
        for numbers in record["tasks"].values():
            # Older records do not say which items these were, or their kind.
            data = numbers.setdefault("data", {"name": record.get("data") or "items not recorded", "sha256": None})
            local = data["name"] if "sha256" in data else None
            data.setdefault("kind", data_kind(local, numbers.get("n", 0), record.get("limit")))
    return records


def task_label(task: str, data: dict[str, Any]) -> str:
    """A task's name in a table, with what was evaluated instead of all of its items."""
    if "sha256" in data:
        return f"{task} ({data['name']})"
    return task if data["kind"] == "whole" else f"{task} (a part)"


def metrics_of(numbers: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of a task's metrics, with the standard error where there is one: a single item has none."""
    for name, value in numbers.items():
        if isinstance(value, float) and name != "version" and not name.endswith("_stderr"):
            error = numbers.get(f"{name}_stderr", math.nan)
            yield name, f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"
