"""The evaluation of a finished model: lm-evaluation-harness' tasks, and HellaSwag in llm.c's completion style."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from recipe.config import ConfigError, first_line
from recipe.distributed import Distributed
from recipe.evaluation.harness import run_harness
from recipe.evaluation.hellaswag import HellaSwag, Scores
from recipe.evaluation.items import describe_data, read_items
from recipe.evaluation.metrics import choose
from recipe.evaluation.records import data_kind
from recipe.evaluation.references import COMPLETION_TASK
from recipe.evaluation.scoring import causal_losses, evaluating


def evaluate(
    name: str,
    tasks: list[str],
    distributed: Distributed,
    data: str | None = None,
    task_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
) -> dict[str, Any] | None:
    """Evaluate a model; the ranks share the items. Arguments and errors as for `run_harness`.

    Returns:
        on rank 0, None on the others: what `run_harness` returns, with the completion style as a task of its own, the number of
        items if limited, dtype, and the sha256 of the model's weights.
    """
    model, tokenizer = load_model(name, distributed.device)
    harness_tasks = [task for task in tasks if task != COMPLETION_TASK]
    results: dict[str, Any] | None = {"tasks": {}, "items": {}, "truncated": 0, "command": None}
    if harness_tasks:
        results = run_harness(name, model, tokenizer, harness_tasks, distributed, data, task_folder, limit, batch_size)
    if COMPLETION_TASK in tasks:
        scores = _score_completion(model, tokenizer, data, limit, batch_size, distributed)
        if results is not None:
            # As of the harness' tasks, a standard error that a single item does not have is left out.
            numbers = {name: value for name, value in scores.metrics().items() if not math.isnan(value)}
            of = describe_data(data) | {"kind": data_kind(data, len(scores.labels), limit)}
            results["tasks"][COMPLETION_TASK] = numbers | {"data": of}
            results["items"][COMPLETION_TASK] = _per_item(scores)
            results["truncated"] += scores.truncated
    if not distributed.is_main:
        return None
    return results | {
        "model": name,
        "model_sha256": hash_weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "limit": limit,
        "ranks": distributed.num_ranks,
    }


def load_model(name: str, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """A causal language model in evaluation mode, in the precision that it is stored in, and its tokenizer.

    Raises:
        ConfigError: if there is none.
    """
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {name} cannot be loaded: {first_line(error)}") from error
    return model.to(device).eval(), tokenizer


def hash_weights(model: PreTrainedModel) -> str:
    """sha256 of the tensors, by name, in the precision that they have."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _score_completion(
    model: PreTrainedModel, tokenizer: Any, data: str | None, limit: int | None, batch_size: int, distributed: Distributed
) -> Scores:
    items = distributed.on_main(read_items, data, limit)
    asked = HellaSwag(items, tokenizer, ("completion",))
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    with evaluating(model):
        # HellaSwag's longest inputs have some 150 tokens.
        return asked.score(causal_losses(model), positions, 128 * batch_size, distributed, _progress(distributed))["completion"]


def _per_item(scores: Scores) -> list[dict[str, Any]]:
    plain, normed = choose(scores.log_likelihoods, scores.lengths)
    return [
        {
            "doc_id": n,
            "target": int(label),
            "acc": float(plain[n] == label),
            "acc_norm": float(normed[n] == label),
            "log_likelihoods": scores.log_likelihoods[n].tolist(),
            "lengths": scores.lengths[n].tolist(),
        }
        for n, label in enumerate(scores.labels)
    ]


def _progress(distributed: Distributed) -> Callable[[int, int], None] | None:
    """A line on rank 0's terminal; None where there is no terminal."""
    if not (distributed.is_main and sys.stderr.isatty()):
        return None
    began = time.monotonic()

    def show(done: int, whole: int) -> None:
        end = "\n" if done == whole else ""
        print(
            f"\rcompletion style: batch {done}/{whole}, {time.monotonic() - began:.0f}s", end=end, file=sys.stderr, flush=True
        )

    return show
