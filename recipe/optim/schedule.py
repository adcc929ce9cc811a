"""The learning rate as a pure function of the step: nothing to save, nothing that ranks could disagree on."""

from __future__ import annotations

import math

from recipe.config import Config
from recipe.plan import Plan


def learning_rate(step: int, config: Config, plan: Plan) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule.

    The first step trains at learning_rate / warmup_steps, the last at the final rate plus one step's worth.
    """
    if step < plan.warmup_steps:
        return config.learning_rate * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.max_steps - plan.warmup_steps)
    final = config.final_learning_rate
    share = {
        "constant": 1.0,
        "linear": final + (1 - final) * (1 - done),
        "cosine": final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)),
    }[config.schedule]
    return config.learning_rate * share
