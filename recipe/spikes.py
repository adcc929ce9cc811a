"""What counts as a spike of the loss, and the record of the rows that were left out for one.

A loss is compared with the mean and the standard deviation of the last accepted steps: one that was left out, for a spike or
for a gradient that is not finite, never moves them. The history stays on the device, where the comparison is made too, so that
finding a spike before its update costs no look from the host.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch

from recipe.files import read_json_lines, sync_folder


class SpikeFinder:
    """The losses of the last `window` accepted steps, oldest first."""

    def __init__(self, window: int, threshold: float, device: torch.device, history: list[float] = ()):
        self._window, self._threshold = window, threshold
        recent = list(history)[-window:]
        self._losses = torch.tensor([math.nan] * (window - len(recent)) + recent, dtype=torch.float64, device=device)

    def limit(self) -> torch.Tensor:
        """The loss above which a step is a spike, scalar: infinite before a quarter of the window is there."""
        known = self._losses.isfinite()
        count = known.sum()
        losses = self._losses.nan_to_num(0.0)
        mean = losses.sum() / count
        deviation = (torch.where(known, losses - mean, 0.0).square().sum() / (count - 1)).sqrt()
        limit = mean + self._threshold * deviation
        return torch.where(count >= max(2, self._window // 4), limit, math.inf).float()

    def accept(self, loss: torch.Tensor, skipped: torch.Tensor) -> None:
        """Take in the loss of a step, the mean over all ranks, unless it was left out."""
        moved = torch.cat([self._losses[1:], loss.reshape(1).double()])
        self._losses = torch.where((skipped > 0) | ~loss.isfinite(), self._losses, moved)

    def forget(self) -> None:
        """Begin the history anew: what follows is no more like what was."""
        self._losses.fill_(math.nan)

    def state(self) -> list[float]:
        """The history, oldest first, for a checkpoint."""
        return [loss for loss in self._losses.tolist() if math.isfinite(loss)]


class SkippedRows:
    """skipped_rows.jsonl: a line for each step whose rows were offending, by rank 0.

    `rows` are the first and the last, numbered through the run as in the field skip_rows. Those with the action rollback are
    left out from then on, also by later starts.
    """

    def __init__(self, path: Path):
        self._path = path

    def add(self, records: list[dict]) -> None:
        """Append durably."""
        with open(self._path, "a", encoding="utf-8") as handle:
            for record in records:
                handle.write(json.dumps(record) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        sync_folder(self._path.parent)

    def left_out(self) -> list[tuple[int, int]]:
        """The ranges that the run leaves out."""
        records = read_json_lines(self._path)
        return [(r["rows"][0], r["rows"][1]) for r in records if r["action"] == "rollback"]
