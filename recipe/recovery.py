"""What to do about steps that went wrong: leave them out, go back before them, or stop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from recipe.config import Config
from recipe.spikes import SkippedRows
from recipe.steps import Step

MAX_SKIPPED_IN_A_ROW = 3
MAX_ROLLBACKS = 3
"""Times that a run goes back without having saved behind the place."""


class TrainingError(RuntimeError):
    """The training cannot go on; the message says why and what to do. `rank` is the one at fault, if it is not all."""

    rank: int | None = None


@dataclass
class Rollback:
    """Go back to the newest checkpoint before the steps in `bad`, and leave out their rows from now on."""

    reason: str
    bad: list[dict[str, Any]]
    """Step, rows, loss and reason of each."""
    allowed: bool = True
    """By the configuration; else the run stops."""

    @property
    def last_good_step(self) -> int:
        return self.bad[0]["step"] - 1


class Recovery:
    """Watches over the steps. It sees the same on every rank, and so decides the same."""

    def __init__(self, config: Config):
        self._config = config
        self._not_finite: list[dict[str, Any]] = []
        self._rollbacks, self._beyond = 0, 0

    def examine(self, steps: list[Step], skipped_rows: SkippedRows | None) -> tuple[list[Step], Rollback | None]:
        """The steps that count, and whether to go back.

        Args:
            skipped_rows: where steps that were left out are recorded, on the rank that does so.
        """
        for position, step in enumerate(steps):
            self._not_finite = [*self._not_finite, _describe(step, "not finite")] if step.skipped and not step.is_spike else []
            if len(self._not_finite) == MAX_SKIPPED_IN_A_ROW:
                return steps[: position + 1], self._too_many_not_finite()
        spikes = [_describe(step, "spike") | {"limit": step.limit} for step in steps if step.is_spike]
        if spikes and self._config.spike_action == "rollback":
            return steps, Rollback(f"the loss of step {spikes[0]['step']} is a spike", spikes)
        if spikes and skipped_rows is not None:
            skipped_rows.add([spike | {"action": "skip"} for spike in spikes])
        return steps, None

    def rolls_back(self, rollback: Rollback) -> None:
        """Count it.

        Raises:
            TrainingError: if the configuration says to stop instead, or after too many without progress.
        """
        if not rollback.allowed:
            raise TrainingError(
                f"{rollback.reason}; the weights are as before them. Continue from the last checkpoint with a lower "
                "learning_rate"
            )
        self._rollbacks, self._beyond = self._rollbacks + 1, rollback.bad[-1]["step"]
        if self._rollbacks > MAX_ROLLBACKS:
            raise TrainingError(f"{rollback.reason}, {MAX_ROLLBACKS} rollbacks did not get beyond it; lower the learning_rate")

    def saved(self, step: int) -> None:
        """A checkpoint behind the bad place is progress."""
        if step > self._beyond:
            self._rollbacks = 0

    def _too_many_not_finite(self) -> Rollback:
        bad, self._not_finite = self._not_finite, []
        reason = f"the gradient was not finite in {len(bad)} steps in a row up to step {bad[-1]['step']}"
        return Rollback(reason, bad, self._config.on_nonfinite == "rollback")


def _describe(step: Step, reason: str) -> dict[str, Any]:
    loss = step.loss if math.isfinite(step.loss) else None
    return {"step": step.number, "rows": list(step.rows), "loss": loss, "reason": reason}
