"""HellaSwag's items: from the Hub, a local copy, or the package's own. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from recipe.config import ConfigError, first_line

HUB_ID = "Rowan/hellaswag"
MINI = Path(__file__).with_name("hellaswag_mini.jsonl")
"""64 items in HellaSwag's format, written for this project: a check that the evaluation runs, not a benchmark."""
_KEYS = {"activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"}


def read_items(data: str | None, limit: int | None = None) -> list[dict[str, Any]]:
    """The validation items.

    Args:
        data: a .jsonl or .parquet file in HellaSwag's format, a folder of such, `mini`, or None for the Hub's.
        limit: how many of the first.
    Raises:
        ConfigError: if they cannot be had, or are not HellaSwag items with labels.
    """
    if data is None:
        name, items = HUB_ID, _download()
    else:
        name = str(MINI if data == "mini" else data)
        items = [item for path in local_files(Path(name)) for item in _read_file(path)]
    items = items[:limit]
    for number, item in enumerate(items):
        if not item.keys() >= _KEYS:
            missing = ", ".join(sorted(_KEYS - item.keys()))
            raise ConfigError(f"evaluate_data: item {number} of {name} has no {missing}; give HellaSwag's format")
        if len(item["endings"]) != 4 or str(item["label"]) not in ("0", "1", "2", "3"):
            raise ConfigError(f"evaluate_data: item {number} of {name} has no four endings with a label from 0 to 3")
    if not items:
        raise ConfigError(f"evaluate_data: {name} holds no items")
    return items


def local_files(path: Path) -> list[Path]:
    """The .jsonl and .parquet files that a path stands for: itself, or those in the folder by name.

    Raises:
        ConfigError: if there are none, or both kinds.
    """
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in (".jsonl", ".parquet"))
    if not files:
        missing = f"{path} holds no .jsonl or .parquet files" if path.is_dir() else f"{path} does not exist"
        raise ConfigError(f"evaluate_data: {missing}; give a HellaSwag-format .jsonl or .parquet, or mini")
    kinds = sorted({f.suffix for f in files})
    if kinds not in ([".jsonl"], [".parquet"]):
        raise ConfigError(f"evaluate_data: {path} must be .jsonl or .parquet, not {', '.join(kinds)}")
    return files


def describe_data(data: str | None, repo: str | None = HUB_ID) -> dict[str, str | None]:
    """Which items these are: name and sha256 of a local copy's files; else name and commit of the Hub's dataset, as the cache
    holds it after loading."""
    if data is not None:
        path = Path(MINI if data == "mini" else data)
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in local_files(path)))
        return {"name": path.name, "sha256": digest.hexdigest()}
    from huggingface_hub.constants import HF_HUB_CACHE

    reference = Path(HF_HUB_CACHE) / f"datasets--{str(repo).replace('/', '--')}" / "refs" / "main"
    return {"name": repo, "revision": reference.read_text(encoding="utf-8").strip() if reference.is_file() else None}


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path).to_pylist()
        # Not splitlines: a text may hold U+2028.
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"evaluate_data: {path} cannot be read: {first_line(error)}") from error
    if not all(isinstance(item, dict) for item in items):
        raise ConfigError(f"evaluate_data: {path} must hold a JSON object a line")
    return items


def _download() -> list[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(HUB_ID, split="validation").to_list()
    except Exception as error:  # the Hub client and datasets raise a dozen types; all mean that there are no items
        raise ConfigError(
            f"evaluate_data: {HUB_ID} cannot be had from the Hub: {first_line(error)}; give a copy with --evaluate_data "
            "FILE.jsonl, or set --hellaswag_every 0"
        ) from error
