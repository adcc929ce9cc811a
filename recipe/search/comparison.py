"""The recipes of the last stages compared: ends of runs, tokens to a loss, wall clock, fits and what they predict."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from recipe.config import ConfigError
from recipe.estimate import SCALING_FIT, Estimate, estimate, parse_machine
from recipe.parsing import parse_config
from recipe.search.results import Record
from recipe.search.statistics import (
    EXPONENTS,
    Noise,
    Point,
    PowerLaw,
    Reached,
    bootstrap,
    fit_power_law,
    interval,
    residual_deviation,
    seed_noise,
    tokens_along,
    tokens_to_reach,
)
from recipe.search.trials import GROUPS, show_tokens

CANDIDATE, BASELINES = "fast", ("llmc", "adamw")
GOALS = {"llmc": 0.40, "adamw": 0.65}
"""Share of the baseline's tokens in which the fast recipe is to reach its final loss."""
GAIN_GOAL, GAIN_BUDGET = 0.25, 100_000_000
"""Nats below llm.c's at equal tokens."""
FREE_FLOOR_BUDGETS = 4
"""Budgets from which on the floor of a fit is fitted as well."""
LLMC_TOKENS, FINEWEB_LOSS = 10_250_000_000, 3.28
"""What llm.c's 124M trains on, to end a little below this loss on FineWeb (3.265 to 3.273 in its three published runs)."""


def trained(records: Iterable[Record]) -> list[Record]:
    """The finished runs with an end: no failures, no stable parts.

    Raises:
        ConfigError: if they were validated on different text.
    """
    found = [r for r in records if r["state"] == "finished" and r["kind"] != "stable"]
    texts = {r["validation_sha256"] for r in found}
    if len(texts) > 1:
        first = {r["validation_sha256"]: f"{r['stage']}/{r['name']}" for r in reversed(found)}
        raise ConfigError(
            f"results: the runs were validated on {len(texts)} different texts, which do not compare: "
            f"{', '.join(first.values())}; report them apart"
        )
    return found


def noise_of(records: Iterable[Record]) -> Noise | None:
    """Over equal runs, pooled: with other seeds or, in two stages, with the same, which a GPU does not repeat bit by bit."""
    equal: dict[tuple, list[float]] = {}
    for r in records:
        recipe = json.dumps(r["overrides"], sort_keys=True)
        equal.setdefault((r["group"], r.get("base"), recipe, r["budget"]), []).append(r["val_loss"])
    return seed_noise(list(equal.values()))


@dataclass(frozen=True)
class End:
    """A recipe at a budget: the mean over its seeds."""

    name: str
    budget: int
    tokens: float
    losses: list[float]
    """One a seed."""
    speed: float
    """Tokens/s over the whole run."""
    curves: list[list[Point]]

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def point(self) -> Point:
        return Point(self.tokens, self.loss)


def ends_of(records: Iterable[Record]) -> dict[str, list[End]]:
    """By group, in ascending order of the budgets: of a group's trials, at each budget the one that ends lowest."""
    found: dict[tuple, list[Record]] = {}
    for r in records:
        found.setdefault((r["group"], r["budget"], r["name"]), []).append(r)
    ends: dict[str, dict[int, End]] = {}
    for (group, budget, name), runs in sorted(found.items()):
        end = End(
            name=name,
            budget=budget,
            tokens=statistics.fmean(r["tokens"] for r in runs),
            losses=[r["val_loss"] for r in sorted(runs, key=lambda r: r["seed"])],
            speed=statistics.fmean(_speed(r) for r in runs),
            curves=[[Point(tokens, loss) for _, tokens, loss in r["curve"]] for r in runs],
        )
        best = ends.setdefault(group, {}).get(budget)
        if best is None or end.loss < best.loss:
            ends[group][budget] = end
    return {group: [by_budget[budget] for budget in sorted(by_budget)] for group, by_budget in ends.items()}


def _speed(record: Record) -> float:
    return record["tokens"] / record["train_seconds"] if record["train_seconds"] else record["tokens_per_second"]


@dataclass(frozen=True)
class Ratio:
    """What the fast recipe needs for the final loss of a baseline at a budget."""

    baseline: str
    end: End
    ends: Reached
    """By ends of runs."""
    along: Reached
    """By the course of its runs: the earliest."""
    speed: float
    """Of the fast recipe, tokens/s."""

    @property
    def reached(self) -> Reached:
        """By ends of runs where these enclose the loss, else by the course of a run, as a bound."""
        enclosed = self.ends.bound == "" and self.ends.tokens is not None
        return self.ends if enclosed or self.along.bound != "at most" else self.along

    @property
    def tokens(self) -> float | None:
        """Share of the baseline's tokens."""
        reached = self.reached
        return None if reached.tokens is None else reached.tokens / self.end.tokens

    @property
    def seconds(self) -> float | None:
        """Share of the baseline's training time."""
        return None if self.tokens is None else self.tokens * self.end.speed / self.speed

    @property
    def meets_goal(self) -> bool | None:
        """None where the loss was not reached in fewer tokens than the goal allows: it may be, by longer runs."""
        if self.tokens is None or self.tokens > GOALS[self.baseline]:
            return False
        return None if self.reached.bound == "more than" else True


def ratios_of(ends: dict[str, list[End]]) -> list[Ratio]:
    """For each baseline and budget."""
    fast = ends.get(CANDIDATE)
    if not fast:
        return []
    ratios = []
    for group in BASELINES:
        for end in ends.get(group, ()):
            crossings = [tokens_along(end.loss, curve) for one in fast for curve in one.curves]
            crossed = [r for r in crossings if r.bound == "at most"]
            along = min(crossed, key=lambda r: r.tokens) if crossed else max(crossings, key=lambda r: r.tokens)
            by_ends = tokens_to_reach(end.loss, [one.point for one in fast])
            near = min(fast, key=lambda one: abs(one.tokens - (by_ends.tokens or 0)))
            ratios.append(Ratio(group, end, by_ends, along, near.speed))
    return ratios


def literature_floor(parameters: int) -> float:
    """Loss of a model of this size after unlimited text by SCALING_FIT, nats a token of its text and tokenizer."""
    floor, a, alpha, _, _ = SCALING_FIT
    return floor + a / parameters**alpha


@dataclass(frozen=True)
class Fit:
    """Loss against tokens of one recipe."""

    group: str
    law: PowerLaw
    given_floor: float | None
    """None if it was fitted."""
    budgets: int
    deviation: float | None
    """Of the losses, nats, for the draws: the larger of seed noise and residuals; None if neither is known."""
    draws: list[PowerLaw]

    def spread(self, of: str) -> tuple[float, float] | None:
        """Interval of floor, scale or exponent."""
        return interval([getattr(law, of) for law in self.draws]) if self.draws else None


def fit_group(group: str, ends: list[End], noise: Noise | None, floor: float | None) -> Fit | None:
    """The fit of a group's ends, one point a seed; None if its budgets do not determine it (a floor of 0 or less, an exponent
    at the edge of what is searched) or lie below a given floor."""
    points = [Point(end.tokens, loss) for end in ends for loss in end.losses]
    if len(ends) < (FREE_FLOOR_BUDGETS if floor is None else 2):
        return None
    if floor is not None and min(p.loss for p in points) <= floor:
        return None
    law = fit_power_law(points, floor)
    if floor is None and (law.floor <= 0 or not 1.01 * EXPONENTS[0] < law.exponent < EXPONENTS[1] / 1.01):
        return None
    known = [
        d for d in (noise and noise.deviation, residual_deviation(points, law, 3 if floor is None else 2)) if d is not None
    ]
    deviation = max(known, default=None)
    draws = bootstrap(points, deviation, floor, GROUPS.index(group)) if deviation is not None else []
    return Fit(group, law, floor, len(ends), deviation, draws)


@dataclass(frozen=True)
class Prediction:
    """A token budget of the fast recipe for llm.c's loss on FineWeb, and what it costs. Predicted, not measured."""

    basis: str
    tokens: float
    low: float | None
    high: float | None
    """Interval of the draws; None without noise."""
    costs: list[tuple[str, Estimate]]


def predict(ratios: list[Ratio], fast: Fit | None, llmc: Fit | None, base: str, prices: dict[str, float]) -> list[Prediction]:
    """From the tokens' ratio to llm.c's at the largest budget, taken to stay as it is; and from two fits, by the tokens after
    which the fast recipe comes to where llm.c's stands after LLMC_TOKENS.

    Args:
        base: configuration of the fast recipe.
        prices: dollars an hour by machine.
    """
    found = []
    held = [r for r in ratios if r.baseline == "llmc" and r.tokens is not None and r.reached.bound != "more than"]
    if held:
        last = max(held, key=lambda r: r.end.tokens)
        bound = " (an upper bound)" if last.reached.bound else ""
        basis = (
            f"the ratio {last.tokens:.2f}{bound} to llm.c's tokens at {show_tokens(last.end.tokens)}, taken to hold at "
            f"{show_tokens(LLMC_TOKENS)}"
        )
        found.append((basis, last.tokens * LLMC_TOKENS, None, None))
    if fast and llmc:
        tokens = fast.law.tokens(llmc.law.loss(LLMC_TOKENS))
        low = high = None
        if fast.draws and llmc.draws:
            pairs = zip(fast.draws, llmc.draws, strict=True)
            low, high = interval([one.tokens(other.loss(LLMC_TOKENS)) for one, other in pairs])
        floor = "fitted floors" if fast.given_floor is None else f"the floor {fast.given_floor:.3f}"
        found.append((f"the fits of both recipes with {floor}, continued to {show_tokens(LLMC_TOKENS)}", tokens, low, high))
    return [Prediction(*one, costs=_costs(one[1], base, prices)) for one in found]


def _costs(tokens: float, base: str, prices: dict[str, float]) -> list[tuple[str, Estimate]]:
    if not 1e6 < tokens < 1e13:
        return []
    config, problems = parse_config([base, "--max_tokens", str(round(tokens))])
    if problems:
        raise ConfigError(*problems)
    return [(name, estimate(config, parse_machine(name), price)) for name, price in prices.items()]
