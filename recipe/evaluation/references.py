"""Published figures to compare a run with: each with its source and the style in which it was measured.

Styles are never compared with each other: on the same weights lm-evaluation-harness' and llm.c's differ by up to two points.
Imports nothing heavy.
"""

from __future__ import annotations

from typing import NamedTuple

HELLASWAG_ITEMS = 10_042
"""Of HellaSwag's validation set, on which the references were measured."""
COMPLETION_TASK = "hellaswag_completion"
"""HellaSwag in llm.c's style: a task of ours beside lm-evaluation-harness'."""
CHANCE = 0.25
"""HellaSwag has four endings an item."""
_LLMC = "https://github.com/karpathy/llm.c/blob/master/dev/data/hellaswag.py"
_GPT3 = "https://arxiv.org/abs/2005.14165, table H.1"
_LEADERBOARD = "https://huggingface.co/spaces/HuggingFaceH4/open_llm_leaderboard"


class Reference(NamedTuple):
    """HellaSwag of a model on all validation items."""

    model: str
    parameters: int
    style: str
    """lm-eval: lm-evaluation-harness, zero-shot. completion: llm.c's. lm-eval 10-shot: the Open LLM Leaderboard's. gpt3:
    OpenAI's own prompts and likelihood a token. Only the first two are styles of this package."""
    acc: float | None
    acc_norm: float | None
    source: str


REFERENCES = (
    Reference("gpt2", 124_439_808, "lm-eval", 0.2892, 0.3114, _LLMC),
    Reference("gpt2-xl", 1_557_611_200, "lm-eval", 0.4004, 0.5089, _LLMC),
    Reference("gpt2", 124_439_808, "completion", 0.2859, 0.2955, _LLMC),
    Reference("gpt2-xl", 1_557_611_200, "completion", 0.3842, 0.4893, _LLMC),
    Reference("gpt2", 124_439_808, "lm-eval 10-shot", None, 0.3153, _LEADERBOARD),
    Reference("gpt2-large", 774_030_080, "lm-eval 10-shot", None, 0.4562, _LEADERBOARD),
    Reference("GPT-3 Small", 125_000_000, "gpt3", None, 0.337, _GPT3),
    Reference("GPT-3 Medium", 350_000_000, "gpt3", None, 0.436, _GPT3),
    Reference("GPT-3 Large", 760_000_000, "gpt3", None, 0.510, _GPT3),
    Reference("GPT-3 XL", 1_300_000_000, "gpt3", None, 0.547, _GPT3),
)


class CurvePoint(NamedTuple):
    """Of a published run: FineWeb validation loss in nats a token, and HellaSwag's completion-style acc_norm."""

    step: int
    val_loss: float
    hellaswag_completion_acc_norm: float | None


LLMC_BATCH_TOKENS = 524_288
LLMC_SOURCE = "https://github.com/karpathy/llm.c/discussions/481"
"""124M on FineWeb, 19,552 to 19,560 steps: AdamW 6e-4, 700 warm-up steps, cosine to 0, weight decay 0.1."""

# fmt: off
_POINTS = {
    "8×A100": (
        (0, 11.0095, None), (250, 6.1565, 0.2437), (500, 5.3976, 0.2435), (750, 4.7382, 0.2514),
        (1000, 4.3211, 0.2538), (1500, 4.0103, 0.2557), (3000, 3.7041, 0.2662), (4500, 3.5884, 0.2725),
        (6000, 3.5104, 0.2774), (7500, 3.4588, 0.287), (9000, 3.4206, 0.2896), (10500, 3.3830, 0.2892),
        (12000, 3.3522, 0.2953), (13500, 3.3245, 0.3004), (15000, 3.3022, 0.3), (16500, 3.2850, 0.3041),
        (18000, 3.2755, 0.3048), (19500, 3.2731, 0.305), (19552, 3.2731, 0.3054),
    ),
    "1×A100": (
        (0, 11.0079, None), (250, 6.2022, 0.2483), (500, 5.4249, 0.2427), (750, 4.7200, 0.2534),
        (1000, 4.3423, 0.257), (1500, 4.0097, 0.263), (3000, 3.6989, 0.2671), (4500, 3.5818, 0.2711),
        (6000, 3.5037, 0.277), (7500, 3.4582, 0.2877), (9000, 3.4139, 0.2853), (10500, 3.3754, 0.2937),
        (12000, 3.3446, 0.2968), (13500, 3.3166, 0.3005), (15000, 3.2940, 0.3041), (16500, 3.2774, 0.3033),
        (18000, 3.2673, 0.3049), (19500, 3.2648, 0.3045), (19560, 3.2648, 0.3046),
    ),
    "8×H100": (
        (0, 11.0092, None), (250, 6.1710, None), (500, 5.3743, None), (750, 4.7097, None),
        (1000, 4.3170, None), (1500, 4.0060, None), (3000, 3.6973, None), (4500, 3.5797, None),
        (6000, 3.5069, None), (7500, 3.4566, None), (9000, 3.4159, None), (10500, 3.3809, None),
        (12000, 3.3509, None), (13500, 3.3226, None), (15000, 3.3003, None), (16500, 3.2841, None),
        (18000, 3.2746, None), (19500, 3.2722, None), (19560, 3.2722, None),
    ),
}
# fmt: on
LLMC_CURVES = {machine: tuple(CurvePoint(*point) for point in points) for machine, points in _POINTS.items()}
"""llm.c's 124M by the machine that it ran on, every 1,500 steps and at its start and end."""


def references(style: str) -> list[Reference]:
    """The models that were measured in a style, the smallest first."""
    return sorted((r for r in REFERENCES if r.style == style), key=lambda r: r.parameters)
