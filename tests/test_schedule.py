"""Learning rates and momentum by step, computed by hand."""

import math
from dataclasses import replace

import pytest

from recipe.config import Config
from recipe.optim.schedule import hyperparameters, learning_rate, muon_momentum
from recipe.plan import Plan, make_plan


def make(schedule: str, final: float = 0.0, warmup: float = 10, steps: int = 110) -> tuple[Config, Plan]:
    config = Config(
        schedule=schedule,
        final_learning_rate=final,
        learning_rate=8e-3,
        warmup_steps=warmup,
        max_steps=steps,
        batch_tokens=64,
        sequence_length=32,
        micro_batch_size=2,
    )
    return config, make_plan(config, 1)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "trapezoidal"])
@pytest.mark.parametrize("step, share", [(0, 0.1), (1, 0.2), (4, 0.5), (8, 0.9), (9, 1.0), (10, 1.0)])
def test_warmup_is_linear_and_reaches_the_peak(schedule, step, share):
    assert learning_rate(step, *make(schedule)) == pytest.approx(8e-3 * share)


@pytest.mark.parametrize(
    "schedule, final, step, share",
    [
        ("constant", 0.0, 11, 1.0),
        ("constant", 0.0, 60, 1.0),
        ("constant", 0.5, 109, 1.0),
        ("linear", 0.0, 11, 0.99),
        ("linear", 0.0, 60, 0.5),
        ("linear", 0.0, 109, 0.01),
        ("linear", 0.0, 110, 0.0),
        ("linear", 0.2, 60, 0.6),
        ("linear", 0.2, 109, 0.208),
        ("linear", 0.2, 110, 0.2),
        ("cosine", 0.0, 35, 0.5 + math.sqrt(2) / 4),
        ("cosine", 0.0, 60, 0.5),
        ("cosine", 0.0, 85, 0.5 - math.sqrt(2) / 4),
        ("cosine", 0.0, 109, math.sin(math.pi / 200) ** 2),
        ("cosine", 0.0, 110, 0.0),
        ("cosine", 0.1, 60, 0.55),
        ("cosine", 0.1, 109, 0.1 + 0.9 * math.sin(math.pi / 200) ** 2),
        ("cosine", 0.1, 110, 0.1),
    ],
)
def test_after_the_warmup(schedule, final, step, share):
    assert learning_rate(step, *make(schedule, final)) == pytest.approx(8e-3 * share, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "trapezoidal"])
def test_without_warmup_the_first_step_is_at_the_peak(schedule):
    assert learning_rate(0, *make(schedule, warmup=0)) == 8e-3


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_it_falls_after_the_warmup_and_stays_above_the_end(schedule):
    config, plan = make(schedule, 0.1)
    rates = [learning_rate(step, config, plan) for step in range(10, 110)]
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[-1] > 0.1 * 8e-3


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "trapezoidal"])
def test_it_is_a_function_of_the_step_alone(schedule):
    config, plan = make(schedule, 0.1)
    forwards = [learning_rate(step, config, plan) for step in range(110)]
    backwards = [learning_rate(step, config, plan) for step in reversed(range(110))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "trapezoidal"])
def test_a_run_of_one_step(schedule):
    assert learning_rate(0, *make(schedule, warmup=0, steps=1)) == 8e-3


def test_the_share_of_a_warmup_counts():
    config, plan = make("constant", warmup=0.1, steps=200)
    assert [learning_rate(step, config, plan) for step in (0, 9, 19, 20)] == pytest.approx([4e-4, 4e-3, 8e-3, 8e-3])


# --- trapezoidal --------------------------------------------------------------------------------------------------


def trapezoidal(decay: float, final: float = 0.0, steps: int = 110) -> tuple[Config, Plan]:
    config, _ = make("trapezoidal", final, steps=steps)
    config = replace(config, decay_steps=decay)
    return config, make_plan(config, 1)


@pytest.mark.parametrize(
    "decay, final, step, share",
    [
        (50, 0.0, 10, 1.0),
        (50, 0.0, 59, 1.0),
        (50, 0.0, 60, 1.0),
        (50, 0.0, 61, 0.98),
        (50, 0.0, 85, 0.5),
        (50, 0.0, 109, 0.02),
        (50, 0.0, 110, 0.0),
        (50, 0.2, 85, 0.6),
        (50, 0.2, 110, 0.2),
        (0.1, 0.0, 99, 1.0),
        (0.1, 0.0, 109, 1 / 11),
        (1, 0.0, 109, 1.0),
        (0, 0.0, 109, 1.0),
        (100, 0.0, 10, 1.0),
        (100, 0.0, 11, 0.99),
    ],
)
def test_trapezoidal_is_stable_and_then_falls(decay, final, step, share):
    assert learning_rate(step, *trapezoidal(decay, final)) == pytest.approx(8e-3 * share, rel=1e-9, abs=1e-15)


def test_the_stable_part_does_not_know_the_length_of_the_run():
    long, short = trapezoidal(20, steps=1000), trapezoidal(20, steps=120)
    assert [learning_rate(step, *long) for step in range(100)] == [learning_rate(step, *short) for step in range(100)]
    assert learning_rate(101, *short) < learning_rate(101, *long)


# --- Muon ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, momentum", [(0, 0.85), (1, 0.8503333), (150, 0.9), (299, 0.9496667), (300, 0.95), (9999, 0.95)])
def test_momentum_rises_from_085(step, momentum):
    assert muon_momentum(step, Config(muon_momentum_warmup_steps=300)) == pytest.approx(momentum, abs=1e-6)


def test_momentum_without_warmup_and_below_the_start():
    assert muon_momentum(0, Config()) == 0.95
    assert muon_momentum(0, Config(muon_momentum=0.5, muon_momentum_warmup_steps=10)) == 0.5


def test_all_rates_follow_one_schedule():
    config, plan = make("linear")
    config = replace(config, muon_learning_rate=0.02, embedding_learning_rate=4e-2)
    for step in (0, 9, 10, 60, 109):
        values = hyperparameters(step, config, plan)
        assert values.learning_rate == learning_rate(step, config, plan)
        assert values.muon_learning_rate == pytest.approx(2.5 * values.learning_rate)
        assert values.embedding_learning_rate == pytest.approx(5 * values.learning_rate)
        assert values.muon_momentum == 0.95


def test_embeddings_without_a_rate_have_adamws():
    config, plan = make("cosine")
    for step in range(110):
        values = hyperparameters(step, config, plan)
        assert values.embedding_learning_rate == values.learning_rate == learning_rate(step, config, plan)
