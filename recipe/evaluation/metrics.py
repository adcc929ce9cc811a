"""The metrics of the evaluations, as `evaluate.Metric`s of the package: they load without the Hub.

`evaluate.Metric` shares its records among processes through files, which several nodes do not have in common. Here each
process gives its counts or its rows to `recipe.distributed`, and every process computes from the whole.
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import numpy as np


class _Metric(evaluate.Metric):
    """A metric whose description is its docstring."""

    INPUTS: str
    FEATURES: dict

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description=self.INPUTS,
            features=datasets.Features(self.FEATURES),
        )


class MultipleChoiceAccuracy(_Metric):
    """Share of items whose right choice has the highest score: log-likelihood (acc), and log-likelihood over the length of the
    choice (acc_norm).

    The style of scoring lies in what is given: for lm-evaluation-harness the log-likelihood of " ending" after the harness'
    query and the characters of the ending; for llm.c's completion style the log-likelihood after the raw `ctx` and the tokens
    of the ending, so that acc_norm takes the least mean loss a token. Of equal scores the first counts, in both.
    """

    INPUTS = (
        "predictions: log-likelihoods of an item's choices; lengths: their lengths; references: the index of the right one."
    )
    FEATURES = {
        "predictions": datasets.Sequence(datasets.Value("float64")),
        "lengths": datasets.Sequence(datasets.Value("float64")),
        "references": datasets.Value("int64"),
    }

    def _compute(self, predictions, lengths, references) -> dict[str, float]:
        plain, normed = choose(predictions, lengths)
        result: dict[str, float] = {"n": len(references)}
        for name, picks in (("acc", plain), ("acc_norm", normed)):
            hits = np.array(picks) == np.array(references)
            result[name] = float(hits.mean())
            result[f"{name}_stderr"] = standard_error(hits)
        return result


class LanguageModelLoss(_Metric):
    """Mean loss in nats a token, perplexity, and bits a byte of the text that was predicted."""

    INPUTS = "predictions: sum of the losses of some targets, nats; references: how many targets; text_bytes: their UTF-8 size."
    FEATURES = {
        "predictions": datasets.Value("float64"),
        "references": datasets.Value("int64"),
        "text_bytes": datasets.Value("int64"),
    }

    def _compute(self, predictions, references, text_bytes) -> dict[str, float]:
        nats, size = math.fsum(predictions), sum(text_bytes)
        loss = nats / sum(references)
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return {
            "loss": loss,
            "perplexity": perplexity,
            "bits_per_byte": nats / math.log(2) / size if size else math.nan,
        }


def choose(predictions: Any, lengths: Any) -> tuple[list[int], list[int]]:
    """For each item the choice with the highest log-likelihood, and with the highest log-likelihood over its length."""
    plain = [int(np.argmax(item)) for item in predictions]
    normed = [int(np.argmax(np.asarray(item) / np.asarray(own))) for item, own in zip(predictions, lengths, strict=True)]
    return plain, normed


def standard_error(values: np.ndarray) -> float:
    """Of the mean of a sample; nan for a single value, as in lm-evaluation-harness."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def compute(metric: type[evaluate.Metric], **columns: Any) -> dict[str, float]:
    """The metric of whole columns, in this process' memory: nothing is written to the cache."""
    return metric(keep_in_memory=True).compute(**columns)
