"""Learning rates and momentum as pure functions of the step: nothing to save, nothing that ranks could disagree on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipe.config import Config
from recipe.plan import Plan

MOMENTUM_START = 0.85
"""Where Muon's momentum warm-up begins, as in the modded-nanogpt speedruns."""


@dataclass(frozen=True)
class Hyperparameters:
    """What the optimizer is told at a step."""

    learning_rate: float
    """AdamW's."""
    embedding_learning_rate: float
    """AdamW's of embedding and positions."""
    muon_learning_rate: float
    muon_momentum: float


def hyperparameters(step: int, config: Config, plan: Plan) -> Hyperparameters:
    """The values of optimizer step `step`, counted from 0."""
    share = schedule_share(step, config, plan)
    embedding = config.learning_rate if config.embedding_learning_rate is None else config.embedding_learning_rate
    return Hyperparameters(
        learning_rate=learning_rate(step, config, plan),
        embedding_learning_rate=embedding * share,
        muon_learning_rate=config.muon_learning_rate * share,
        muon_momentum=muon_momentum(step, config),
    )


def learning_rate(step: int, config: Config, plan: Plan) -> float:
    """AdamW's learning rate of optimizer step `step`, counted from 0."""
    return config.learning_rate * schedule_share(step, config, plan)


def schedule_share(step: int, config: Config, plan: Plan) -> float:
    """The share of the peak learning rates at optimizer step `step`, counted from 0: linear warm-up, then the schedule.

    The first step trains at 1 / warmup_steps, the last at the final share plus one step's worth. Trapezoidal (warm-up,
    stable, decay: Hu et al. 2024, MiniCPM) falls linearly over the last decay_steps; before them it does not depend on the
    length of the run, so that runs of several lengths can branch off one.
    """
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    final = config.final_learning_rate
    start = plan.warmup_steps
    if config.schedule == "trapezoidal":
        start = max(start, plan.max_steps - plan.decay_steps)
        if step < start:
            return 1.0
    done = (step - start) / max(1, plan.max_steps - start)
    falling = final + (1 - final) * (1 - done)
    return {
        "constant": 1.0,
        "linear": falling,
        "trapezoidal": falling,
        "cosine": final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)),
    }[config.schedule]


def muon_momentum(step: int, config: Config) -> float:
    """Muon's momentum at optimizer step `step`, counted from 0: linear from 0.85 over muon_momentum_warmup_steps."""
    if step >= config.muon_momentum_warmup_steps:
        return config.muon_momentum
    start = min(MOMENTUM_START, config.muon_momentum)
    return start + (config.muon_momentum - start) * step / config.muon_momentum_warmup_steps
