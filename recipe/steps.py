"""Optimizer steps that the device may still be at: kept on it, and read once a log interval."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from recipe.distributed import Distributed
from recipe.engine import StepResult
from recipe.plan import Plan


@dataclass
class StepTimer:
    """Start and end of a step, on the device's clock where there is one, so that timing does not wait for it."""

    cuda: bool
    marks: list = field(default_factory=list)

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """Between the two marks; on a GPU the later one must have passed."""
        start, end = self.marks
        return start.elapsed_time(end) / 1000 if self.cuda else end - start


@dataclass
class Step:
    """A step that has been taken."""

    number: int
    """Counted from 1."""
    rows: tuple[int, int]
    """First and last row of its batch."""
    waited: float
    """Seconds that the host waited for its text."""
    learning_rate: float
    result: StepResult
    timer: StepTimer
    loss: float = 0.0
    """Mean over all ranks, known once it has been read, as are the following."""
    grad_norm: float = 0.0
    skipped: bool = False
    limit: float = float("inf")
    """Loss from which it is a spike."""

    @property
    def is_spike(self) -> bool:
        return self.loss > self.limit


class Steps:
    """The steps since the last look."""

    def __init__(self, plan: Plan, flops_per_token: Callable[[int], float], peak_flops: float | None, distributed: Distributed):
        """
        Args:
            flops_per_token: training FLOPs a token by the length of the sequences.
            peak_flops: FLOP/s of one device, if its model is known.
        """
        self._plan, self._distributed, self._flops_per_token = plan, distributed, flops_per_token
        self._peak_flops = peak_flops and peak_flops * plan.num_processes
        self._pending: list[Step] = []

    def add(self, step: Step) -> None:
        self._pending.append(step)

    def read(self) -> list[Step]:
        """The one place where the host waits for the device. Collective."""
        if not self._pending:
            return []
        columns = torch.stack(
            [torch.stack([s.result.loss, s.result.grad_norm, s.result.skipped, s.result.limit_or_inf()]) for s in self._pending]
        )
        losses = self._distributed.mean(columns[:, 0].clone()).tolist()
        steps, self._pending = self._pending, []
        for step, loss, (norm, skipped, limit) in zip(steps, losses, columns[:, 1:].tolist(), strict=True):
            step.loss, step.grad_norm, step.skipped, step.limit = loss, norm, bool(skipped), limit
        return steps

    def line(self, step: Step) -> dict[str, Any]:
        """Of metrics.jsonl, for a step that has been read."""
        seconds = step.timer.seconds()
        speed = self._plan.tokens_at(step.number - 1) / seconds
        flops = speed * self._flops_per_token(self._plan.sequence_length_at(step.number - 1))
        return {
            "step": step.number,
            "tokens": self._plan.tokens_after(step.number),
            "train_loss": step.loss,
            "lr": step.learning_rate,
            "grad_norm": step.grad_norm,
            "tokens_per_second": speed,
            "step_seconds": seconds,
            "data_wait_fraction": min(1.0, step.waited / seconds),
            "mfu": self._peak_flops and flops / self._peak_flops,
            "gpu_memory_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3) if self._distributed.cuda else None,
            "skipped": int(step.skipped),
        }
