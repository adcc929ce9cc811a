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

MOST_IN_A_ROW = 16
"""Spikes in a row after which it is the level of the loss that has changed, and not the text: left out one after another, they
would keep it there for the rest of the run. It begins a new history."""


class SpikeFinder:
    """The losses of the last `window` accepted steps, oldest first.

    Args:
        history: as `state` gave it.
        in_a_row: as `in_a_row` gave it.
    """

    def __init__(self, window: int, threshold: float, device: torch.device, history: list[float] = (), in_a_row: int = 0):
        self._window, self._threshold = window, threshold
        self._in_a_row = torch.tensor(in_a_row, device=device)
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

    def accept(self, loss: torch.Tensor, skipped: torch.Tensor, limit: torch.Tensor | float = math.inf) -> None:
        """Take in the loss of a step, the mean over all ranks, unless it was left out or lies above the step's `limit`."""
        spike = loss > limit
        moved = torch.cat([self._losses[1:], loss.reshape(1).double()])
        losses = torch.where((skipped > 0) | spike | ~loss.isfinite(), self._losses, moved)
        in_a_row = torch.where(spike, self._in_a_row + 1, 0)
        another_level = in_a_row >= MOST_IN_A_ROW
        self._losses = torch.where(another_level, math.nan, losses)
        self._in_a_row = torch.where(another_level, 0, in_a_row)

    def forget(self) -> None:
        """Begin the history anew: what follows is no more like what was."""
        self._losses = torch.full_like(self._losses, math.nan)
        self._in_a_row = torch.zeros_like(self._in_a_row)

    def in_a_row(self) -> int:
        """Spikes up to the last step, for a checkpoint."""
        return int(self._in_a_row)

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
