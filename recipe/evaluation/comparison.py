"""Two models on the same items: is one better, or is it chance?"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from recipe.config import ConfigError
from recipe.evaluation.metrics import standard_error


class Comparison(NamedTuple):
    """Of A and B by one metric."""

    metric: str
    n: int
    a: float
    """Mean of A."""
    b: float
    difference: float
    """Mean of A minus mean of B."""
    standard_error: float
    """Of the difference, over items: smaller than for two separate samples, since both models tend to miss the same items."""
    only_a: int | None
    """Items that only A has right; None, as the following, for metrics other than right or wrong."""
    only_b: int | None
    p_value: float | None
    """McNemar's exact test, two-sided: how likely so uneven a split of the items that only one has right, if both are equally
    good."""


def compare_items(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[Comparison]:
    """By every metric that both hold.

    Args:
        a, b: a task's items in the results of `recipe.evaluation.suite.evaluate`.
    Raises:
        ConfigError: if they are not the same items.
    """
    keys = [[(item["doc_id"], item.get("doc_hash"), item["target"]) for item in items] for items in (a, b)]
    if len(a) != len(b):
        raise ConfigError(f"A has {len(a)} items and B {len(b)}; evaluate both on the same, with the same --limit")
    if keys[0] != keys[1]:
        raise ConfigError("A and B were evaluated on different items; use the same data and version of the task")
    not_metrics = {"doc_id", "target"}
    names = [k for k, v in a[0].items() if k in b[0] and k not in not_metrics and isinstance(v, int | float)]
    return [_compare(name, np.array([i[name] for i in a], float), np.array([i[name] for i in b], float)) for name in names]


def _compare(name: str, a: np.ndarray, b: np.ndarray) -> Comparison:
    only_a = only_b = p_value = None
    if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
        p_value = mcnemar(only_a, only_b)
    difference = float((a - b).mean())
    return Comparison(
        name, len(a), float(a.mean()), float(b.mean()), difference, standard_error(a - b), only_a, only_b, p_value
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value: under equal skill each item that only one has right is a coin toss."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def describe(task: str, comparison: Comparison) -> list[str]:
    """Lines for a reader."""
    c = comparison
    lines = [
        f"{task} {c.metric}: A {c.a:.4f}, B {c.b:.4f}, difference {c.difference:+.4f} ± {c.standard_error:.4f} ({c.n} items)"
    ]
    if c.p_value is not None:
        verdict = (
            "no difference that these items could show"
            if c.p_value >= 0.05
            else f"{'A' if c.difference > 0 else 'B'} is better"
        )
        lines.append(f"  only A right: {c.only_a}, only B right: {c.only_b}; McNemar p = {c.p_value:.2g}: {verdict}")
    return lines
