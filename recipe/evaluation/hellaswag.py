"""HellaSwag: its items, and what a model is asked about them in each of the two styles.

Both ask which of four endings is the likeliest. `lm-eval` is lm-evaluation-harness' task: the query is the activity label and
the context cleaned of WikiHow's markers, and acc_norm divides a log-likelihood by the ending's characters. `completion` is
llm.c's: the raw context, and acc_norm is the least mean loss a token. On the same weights they differ by 1.6 points and more
(OpenAI's gpt2: 0.3114 and 0.2955), so a number without its style means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipe.distributed import Distributed
from recipe.evaluation.metrics import MultipleChoiceAccuracy, compute
from recipe.evaluation.scoring import Losses, Request, no_reason, score

STYLES = ("lm-eval", "completion")


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
        reason_to_stop: Callable[[], str | None] = no_reason,
    ) -> dict[str, Scores]:
        """Score every style; the ranks share the work, and each gets all scores. Arguments as for `score`."""
        result = {}
        for style, (requests, lengths) in self._asked.items():
            sums, truncated = score(requests, losses, max_length, batch_tokens, distributed, progress, reason_to_stop)
            result[style] = Scores(sums.reshape(-1, 4), lengths, self._labels, truncated)
        return result


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
