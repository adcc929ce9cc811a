"""What the results say: seed noise, gains over a baseline, tokens to a loss, fits. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# fmt: off
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on
"""Student's t for 95% two-sided, 1 to 30 degrees of freedom."""
EXPONENTS = (0.02, 2.0)
"""Between which a fit looks for its exponent."""
DRAWS = 1000
"""Of a bootstrap."""
INTERVAL = (5, 95)
"""Percentiles that are given as the uncertainty of a fit."""


def t_95(freedom: int) -> float:
    """Student's t for 95% two-sided; above 30 degrees of freedom the normal distribution's, a little raised."""
    return _T_95[freedom - 1] if freedom <= len(_T_95) else 1.96 + 2.5 / freedom


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the final loss over equal runs, pooled over all recipes that were run more than once."""

    deviation: float
    """Nats."""
    freedom: int
    """Degrees of freedom."""


def seed_noise(samples: Sequence[Sequence[float]]) -> Noise | None:
    """Of losses of equal runs, which differ in the seed or not even in it; None without two of any."""
    several = [losses for losses in samples if len(losses) > 1]
    freedom = sum(len(losses) - 1 for losses in several)
    if not freedom:
        return None
    squares = sum((x - sum(losses) / len(losses)) ** 2 for losses in several for x in losses)
    return Noise(math.sqrt(squares / freedom), freedom)


@dataclass(frozen=True)
class Gain:
    """How far below the baseline's a candidate's mean loss ends."""

    mean: float
    """Nats; positive is better."""
    margin: float | None
    """What the seeds alone make of equal recipes in 95 of 100 comparisons; None where no noise was measured."""

    @property
    def verdict(self) -> str:
        if self.margin is None:
            return "unknown: no seed noise"
        if abs(self.mean) <= self.margin:
            return "within the noise"
        return "better" if self.mean > 0 else "worse"


def gain(baseline: Sequence[float], candidate: Sequence[float], noise: Noise | None) -> Gain:
    """Of final losses, one a seed: Student's t with the pooled deviation."""
    mean = float(np.mean(baseline) - np.mean(candidate))
    if noise is None:
        return Gain(mean, None)
    return Gain(mean, t_95(noise.freedom) * noise.deviation * math.sqrt(1 / len(baseline) + 1 / len(candidate)))


class Point(NamedTuple):
    tokens: float
    loss: float


@dataclass(frozen=True)
class Reached:
    """Tokens after which a loss is reached."""

    tokens: float | None
    """None if it is not reached within what was run."""
    bound: str = ""
    """`at most` where the smallest run already ends below the loss, or along a curve; `more than` where no run reaches it."""


def tokens_to_reach(loss: float, ends: Sequence[Point]) -> Reached:
    """Tokens of the run that would end at `loss`, interpolated between the ends of runs, the loss linear in the logarithm of
    the tokens. Each run has its whole schedule behind it, so that this compares like with like; nothing is extrapolated."""
    ends = sorted(ends)
    if not ends:
        return Reached(None)
    if ends[0].loss <= loss:
        return Reached(ends[0].tokens, "" if ends[0].loss == loss else "at most")
    for before, after in zip(ends, ends[1:], strict=False):
        if after.loss <= loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            return Reached(before.tokens * (after.tokens / before.tokens) ** share)
    return Reached(ends[-1].tokens, "more than")


def tokens_along(loss: float, curve: Sequence[Point]) -> Reached:
    """Tokens after which one run passes `loss` in its course, between validation losses. Its schedule is then still far from
    its end: a run made for so few tokens would have ended lower, so that this is an upper bound."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after.loss <= loss < before.loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            return Reached(before.tokens + share * (after.tokens - before.tokens), "at most")
    return Reached(curve[-1].tokens if curve else None, "more than" if curve else "")


@dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale * tokens ** -exponent."""

    floor: float
    scale: float
    exponent: float

    def loss(self, tokens: float) -> float:
        return self.floor + self.scale * tokens**-self.exponent

    def tokens(self, loss: float) -> float:
        """After which it comes down to `loss`; infinite for one at or below the floor."""
        if loss <= self.floor:
            return math.inf
        return math.exp(min(700.0, math.log(self.scale / (loss - self.floor)) / self.exponent))


def fit_power_law(points: Sequence[Point], floor: float | None = None) -> PowerLaw:
    """Least squares in the loss. For an exponent the best floor and scale are those of a line, so that one number is searched.

    Args:
        floor: taken as given instead of fitted.
    Raises:
        ValueError: for fewer distinct budgets than numbers to fit.
    """
    tokens, losses = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if len(set(tokens)) < (3 if floor is None else 2):
        raise ValueError(f"{len(set(tokens))} budgets do not determine {3 if floor is None else 2} numbers")
    middle = math.exp(float(np.log(tokens).mean()))  # or the powers would be tiny

    def solve(exponent: float) -> tuple[float, float, float]:
        powers = (tokens / middle) ** -exponent
        if floor is None:
            centred = powers - powers.mean()
            scale = float(centred @ losses / (centred @ centred))
            offset = float(losses.mean() - scale * powers.mean())
        else:
            offset, scale = floor, float(powers @ (losses - floor) / (powers @ powers))
        return float(np.square(offset + scale * powers - losses).sum()), offset, scale

    exponent = _minimise(lambda b: solve(b)[0], *EXPONENTS)
    _, offset, scale = solve(exponent)
    return PowerLaw(offset, scale * middle**exponent, exponent)


def bootstrap(
    points: Sequence[Point], deviation: float, floor: float | None = None, seed: int = 0, draws: int = DRAWS
) -> list[PowerLaw]:
    """Fits of the points with other noise on them: normal, of the given deviation in nats, about the fitted losses."""
    rng = np.random.default_rng(seed)
    law = fit_power_law(points, floor)
    return [
        fit_power_law([Point(p.tokens, law.loss(p.tokens) + rng.normal(0, deviation)) for p in points], floor)
        for _ in range(draws)
    ]


def residual_deviation(points: Sequence[Point], law: PowerLaw, fitted: int) -> float | None:
    """Of the points about a fit with `fitted` numbers, nats; None if they determine no more than the fit."""
    freedom = len(points) - fitted
    if freedom < 1:
        return None
    return math.sqrt(sum((p.loss - law.loss(p.tokens)) ** 2 for p in points) / freedom)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The INTERVAL of values, some of which may be infinite."""
    ordered = sorted(values)
    low, high = (ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] for percent in INTERVAL)
    return low, high


def _minimise(function: Callable[[float], float], low: float, high: float) -> float:
    """The minimum: the best of a grid, then golden section between its neighbours."""
    grid = np.geomspace(low, high, 25)
    best = int(np.argmin([function(x) for x in grid]))
    low, high = float(grid[max(0, best - 1)]), float(grid[min(len(grid) - 1, best + 1)])
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if function(a) <= function(b):
            high = b
        else:
            low = a
    return (low + high) / 2
