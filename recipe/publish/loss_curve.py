"""The loss curve of a run as a picture for its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipe.evaluation.references import LLMC_BATCH_TOKENS, LLMC_CURVES

REFERENCE = "8×A100"


def write_loss_curve(records: list[dict[str, Any]], is_fineweb: bool, path: Path) -> bool:
    """Draw training and validation loss over tokens.

    Args:
        records: lines of metrics.jsonl.
        is_fineweb: whether the losses compare with llm.c's 124M, which is then drawn beside them.
    Returns:
        whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    training = [(r["tokens"], r["train_loss"]) for r in records if r.get("train_loss") is not None]
    validation = [(r["tokens"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    if not training:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), color="tab:blue", linewidth=0.6, alpha=0.5, label="training loss of a step")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:red", marker=".", label="validation loss")
    if is_fineweb:
        points = [(p.step * LLMC_BATCH_TOKENS, p.val_loss) for p in LLMC_CURVES[REFERENCE] if p.step]
        last = training[-1][0]
        points = [point for point in points if point[0] <= 1.05 * last]
        if points:
            axes.plot(*zip(*points, strict=True), color="tab:gray", linestyle="--", label="llm.c's 124M, validation")
    # The first steps, near ln(vocabulary), would press the rest together.
    losses = sorted(loss for _, loss in training[len(training) // 20 :])
    lowest = min([losses[0], *(loss for _, loss in validation)])
    axes.set_ylim(lowest - 0.1, losses[-1] + 0.1)
    axes.set_xlabel("tokens")
    axes.set_ylabel("nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", metadata={"Software": None})
    return True
