"""The learning rate by step, computed by hand."""

import math

import pytest

from recipe.config import Config
from recipe.optim.schedule import learning_rate
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


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
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


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_without_warmup_the_first_step_is_at_the_peak(schedule):
    assert learning_rate(0, *make(schedule, warmup=0)) == 8e-3


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_it_falls_after_the_warmup_and_stays_above_the_end(schedule):
    config, plan = make(schedule, 0.1)
    rates = [learning_rate(step, config, plan) for step in range(10, 110)]
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[-1] > 0.1 * 8e-3


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_it_is_a_function_of_the_step_alone(schedule):
    config, plan = make(schedule, 0.1)
    forwards = [learning_rate(step, config, plan) for step in range(110)]
    backwards = [learning_rate(step, config, plan) for step in reversed(range(110))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_run_of_one_step(schedule):
    assert learning_rate(0, *make(schedule, warmup=0, steps=1)) == 8e-3


def test_the_share_of_a_warmup_counts():
    config, plan = make("constant", warmup=0.1, steps=200)
    assert [learning_rate(step, config, plan) for step in (0, 9, 19, 20)] == pytest.approx([4e-4, 4e-3, 8e-3, 8e-3])
