"""What is looked at while training: validation loss, HellaSwag in both styles, generated samples. On the weights as they are:
neither the random number generators nor the model's mode change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from recipe.config import Config
from recipe.distributed import Distributed
from recipe.engine import Engine
from recipe.evaluation.hellaswag import HellaSwag
from recipe.evaluation.metrics import LanguageModelLoss, compute
from recipe.evaluation.records import data_kind
from recipe.evaluation.scoring import Interrupted, evaluating, no_reason, training_losses
from recipe.inputs import Inputs
from recipe.model import PretrainingModel, continue_text
from recipe.watchdog import Watchdog

MAX_BATCH_TOKENS = 65_536
"""Tokens of a HellaSwag batch at most; a smaller micro-batch, which is known to fit the memory, lowers it."""
SAMPLE_PROMPTS = ("The", "In this example", "Once upon a time")
SAMPLE_TOKENS = 64


class InLoopHellaSwag:
    """The items of a run, encoded once."""

    def __init__(self, items: list[dict[str, Any]], tokenizer: Any, config: Config):
        self._set = HellaSwag(items, tokenizer)
        self._kind = data_kind(config.evaluate_data, len(items), config.hellaswag_items)
        self._max_length = config.n_positions
        self._batch_tokens = min(MAX_BATCH_TOKENS, config.micro_batch_size * config.sequence_length)

    def evaluate(
        self, model: PretrainingModel, distributed: Distributed, reason_to_stop: Callable[[], str | None] = no_reason
    ) -> dict[str, float | str]:
        """The fields of metrics.jsonl: lm-evaluation-harness' style under the plain names, llm.c's under
        `hellaswag_completion_...`, what they are of, and how many inputs were cut to the model's positions. Collective.

        Raises:
            Interrupted: if there is a reason to stop.
        """
        with evaluating(model):
            scores = self._set.score(
                training_losses(model),
                self._max_length,
                self._batch_tokens,
                distributed,
                reason_to_stop=reason_to_stop,
            )
        harness, completion = scores["lm-eval"].metrics(), scores["completion"].metrics()
        return {
            "hellaswag_acc": harness["acc"],
            "hellaswag_acc_norm": harness["acc_norm"],
            "hellaswag_n": harness["n"],
            "hellaswag_kind": self._kind,
            "hellaswag_acc_norm_stderr": harness["acc_norm_stderr"],
            "hellaswag_completion_acc": completion["acc"],
            "hellaswag_completion_acc_norm": completion["acc_norm"],
            "hellaswag_completion_acc_norm_stderr": completion["acc_norm_stderr"],
            "hellaswag_truncated": scores["lm-eval"].truncated + scores["completion"].truncated,
        }


def validate(
    engine: Engine,
    inputs: Inputs,
    micro_batch_size: int,
    distributed: Distributed,
    watchdog: Watchdog,
    step: int,
    reason_to_stop: Callable[[], str | None] = no_reason,
) -> dict[str, float]:
    """The fields of metrics.jsonl: mean loss of the validation targets in nats a token, and in bits a byte. Collective.

    Raises:
        Interrupted: if there is a reason to stop.
    """
    own = inputs.validation_rows[distributed.rank :: distributed.num_ranks]
    most = -(-len(inputs.validation_rows) // distributed.num_ranks)
    total = torch.zeros(2, dtype=torch.float64, device=distributed.device)
    for start in range(0, most, micro_batch_size):
        watchdog.enter("validate" if start else "first step", step)  # the first may compile
        if reason := reason_to_stop():
            raise Interrupted(reason)
        if start >= len(own):
            break  # the others have some rows left
        rows = own[start : start + micro_batch_size]
        count = len(rows)
        if count < micro_batch_size:
            # One shape for all batches: a compiled model must not be compiled again for the last.
            rows = np.concatenate([rows, np.repeat(rows[:1], micro_batch_size - count, axis=0)])
        losses = engine.losses(distributed.to_device(rows))[:count]
        total[0] += losses.double().sum()
        total[1] += losses.numel()
    nats, targets = (distributed.mean(total) * distributed.num_ranks).tolist()
    found = compute(LanguageModelLoss, predictions=[nats], references=[round(targets)], text_bytes=[inputs.validation_bytes])
    return {"val_loss": found["loss"], "val_bits_per_byte": found["bits_per_byte"]}


def sample(model: PretrainingModel, tokenizer: Any, vocab_size: int, seed: int) -> list[dict[str, str]]:
    """Greedy and sampled continuations of fixed prompts: prompt, continuation and greedy of each."""
    samples = []
    for n, prompt in enumerate(SAMPLE_PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        drawn = continue_text(model.gpt2, vocab_size, ids, SAMPLE_TOKENS, seed=seed + n)
        likeliest = continue_text(model.gpt2, vocab_size, ids, SAMPLE_TOKENS, temperature=0)
        samples.append({"prompt": prompt, "continuation": tokenizer.decode(drawn), "greedy": tokenizer.decode(likeliest)})
    return samples
