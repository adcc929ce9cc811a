"""HellaSwag: its items, and what a model is asked about them in each of the two styles.

Both ask which of four endings is the likeliest. `lm-eval` is lm-evaluation-harness' task: the query is the activity label and
the context cleaned of WikiHow's markers, and acc_norm divides a log-likelihood by the ending's characters. `completion` is
llm.c's: the raw context, and acc_norm is the least mean loss a token. On the same weights they differ by 1.6 points and more
(OpenAI's gpt2: 0.3114 and 0.2955), so a number without its style means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipe.config import ConfigError, first_line
from recipe.distributed import Distributed
from recipe.evaluation.metrics import MultipleChoiceAccuracy, compute
from recipe.evaluation.scoring import Losses, Request, score

HUB_ID = "Rowan/hellaswag"
MINI = Path(__file__).with_name("hellaswag_mini.jsonl")
"""64 items in HellaSwag's format, written for this project: a check that the evaluation runs, not a benchmark."""
STYLES = ("lm-eval", "completion")
_KEYS = {"activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"}


@dataclass
class Scores:
    """The log-likelihoods of a style."""

    log_likelihoods: np.ndarray
    """[items, 4], nats."""
    lengths: np.ndarray
    """[items, 4]: characters (lm-eval) or tokens (completion) of the endings."""
    labels: np.ndarray
    """[items]: the right endings."""
    truncated: int
    """Requests that were cut to the model's positions."""

    def metrics(self) -> dict[str, float]:
        """n, acc, acc_norm and their standard errors."""
        return compute(MultipleChoiceAccuracy, predictions=self.log_likelihoods, lengths=self.lengths, references=self.labels)


class HellaSwag:
    """The items, encoded once, to be scored as often as one likes."""

    def __init__(self, items: list[dict[str, Any]], tokenizer: Any, styles: tuple[str, ...] = STYLES):
        self._labels = np.array([int(item["label"]) for item in items])
        self._asked = {style: _ask(items, tokenizer, style) for style in styles}

    def __len__(self) -> int:
        return len(self._labels)

    def score(
        self,
        losses: Losses,
        max_length: int,
        batch_tokens: int,
        distributed: Distributed,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Scores]:
        """Score every style; the ranks share the work and each gets all scores. Arguments as in recipe.evaluation.scoring."""
        result = {}
        for style, (requests, lengths) in self._asked.items():
            sums, truncated = score(requests, losses, max_length, batch_tokens, distributed, progress)
            result[style] = Scores(sums.reshape(-1, 4), lengths, self._labels, truncated)
        return result


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
        raise ConfigError(f"evaluate_data: {missing}; give a copy of the data in one of these formats, or mini")
    if len({f.suffix for f in files}) > 1 or files[0].suffix not in (".jsonl", ".parquet"):
        raise ConfigError(
            f"evaluate_data: {path} must be .jsonl or .parquet, not {', '.join(sorted({f.suffix for f in files}))}"
        )
    return files


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


def _ask(items: list[dict[str, Any]], tokenizer: Any, style: str) -> tuple[list[Request], np.ndarray]:
    """Four requests an item, and the lengths of the endings [items, 4]."""
    return (_ask_as_harness if style == "lm-eval" else _ask_as_llmc)(items, tokenizer)


def _ask_as_harness(items: list[dict[str, Any]], tokenizer: Any) -> tuple[list[Request], np.ndarray]:
    """As lm_eval/tasks/hellaswag/utils.py and LM._encode_pair do."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    contexts, wholes, lengths = [], [], []
    for item in items:
        query = preprocess(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
        endings = [preprocess(ending) for ending in item["endings"]]
        # White space at the end of a context counts as the ending's, with which it is encoded.
        contexts.append(query.rstrip())
        wholes += [f"{query} {ending}" for ending in endings]
        lengths.append([float(len(ending)) for ending in endings])
    starts = [len(ids) for ids in tokenizer(contexts)["input_ids"]]
    ids = tokenizer(wholes)["input_ids"]
    return [Request(tokens, starts[n // 4]) for n, tokens in enumerate(ids)], np.array(lengths)


def _ask_as_llmc(items: list[dict[str, Any]], tokenizer: Any) -> tuple[list[Request], np.ndarray]:
    """As llm.c's dev/data/hellaswag.py does: no token in front, context and ending encoded apart."""
    contexts = tokenizer([item["ctx"] for item in items], add_special_tokens=False)["input_ids"]
    endings = tokenizer([f" {e}" for item in items for e in item["endings"]], add_special_tokens=False)["input_ids"]
    requests = [Request(contexts[n // 4] + ending, len(contexts[n // 4])) for n, ending in enumerate(endings)]
    return requests, np.array([float(len(ending)) for ending in endings]).reshape(-1, 4)
