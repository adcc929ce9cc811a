"""Estimates of memory, time and money against hand-made arithmetic and measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from launch import ROOT, environment
from recipe.config import Config, ConfigError
from recipe.estimate import (
    GIB,
    SIZES,
    best_within,
    estimate,
    largest_micro_batch,
    memory_by_part,
    parse_machine,
    predicted_loss,
    tokens_per_second,
    with_size,
)  # fmt: skip
from recipe.plan import load_run


@pytest.fixture(scope="module")
def config() -> Config:
    return load_run(["configs/gpt2-124m.yaml"], 1)[0]


def test_memory_is_the_sum_of_what_zero_1_keeps(config: Config) -> None:
    memory = memory_by_part(config, 8)
    parameters = 124_475_904  # with the vocabulary padded to 50,304
    assert memory == {
        "weights": 2 * parameters,
        "gradients": 2 * parameters,
        "gradient sums": 4 * parameters,
        "masters": 4 * parameters // 8,
        "moments": parameters,
        "activations": 32 * 768 * 12 * 65_536,
        "logits": 2 * 50_304 * 65_536,
        "buckets": 0,  # smaller than the activations, which are gone by then
    }
    muon = memory_by_part(replace(config, optimizer="muon"), 8)
    assert memory["moments"] - muon["moments"] == 4 * 84_934_656 // 8  # one moment for the blocks' matrices instead of two


def test_memory_agrees_with_an_h100(config: Config) -> None:
    # 124M, 64 rows, one rank: torch's peak was 29.26 GB under ZeRO-1 (docs/results.md).
    assert sum(memory_by_part(config, 1).values()) == pytest.approx(29.26e9, rel=0.1)


def test_the_measured_speed_is_given_as_it_is(config: Config) -> None:
    speed, measured = tokens_per_second(config, parse_machine("H100-80GB"))
    assert measured and speed == pytest.approx(544_000)
    run = estimate(config, parse_machine("1xH100-80GB"), price_per_hour=3.0)
    assert run.hours == pytest.approx(9_900_130_304 / 544_000 / 3600)
    assert run.dollars == pytest.approx(3 * run.hours)
    assert run.basis == "measured"
    assert run.mfu == pytest.approx(544_000 * 797_815_296 / 989e12, rel=1e-6)


def test_eight_gpus_pay_for_the_exchange(config: Config) -> None:
    one, _ = tokens_per_second(config, parse_machine("A100-80GB"))
    eight, measured = tokens_per_second(config, parse_machine("8xA100-80GB"))
    seconds = 524_288 / (8 * one) + 10 * 124_439_808 * 7 / 8 / 230e9
    assert not measured and eight == pytest.approx(524_288 / seconds)
    across, _ = tokens_per_second(config, parse_machine("16xA100-80GB"))
    assert across < 2 * eight  # the network between nodes is slower


def test_the_micro_batch_fits_and_divides(config: Config) -> None:
    large = with_size(config, "1558M")
    rows = largest_micro_batch(large, parse_machine("8xA100-80GB"))
    limit = 0.93 * 80 * GIB
    assert sum(memory_by_part(replace(large, micro_batch_size=rows), 8).values()) <= limit
    assert sum(memory_by_part(replace(large, micro_batch_size=2 * rows), 8).values()) > limit
    assert largest_micro_batch(large, parse_machine("RTX4090-24GB")) is None
    run = estimate(large, parse_machine("RTX4090-24GB"))
    assert not run.fits and run.memory is None
    assert estimate(config, parse_machine("64xH100-80GB")).micro_batch_size == 8  # 512 rows over 64 GPUs


@pytest.mark.parametrize("name", ["8xB100", "0xA100-80GB", "eight A100", ""])
def test_an_unknown_machine_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="A100-80GB"):
        parse_machine(name)


def test_the_best_run_for_a_time_is_the_one_with_the_lowest_loss(config: Config) -> None:
    machine = parse_machine("8xA100-80GB")
    runs = best_within(config, machine, 1.5, 14.0)
    assert {size for size, _, _ in runs} == set(SIZES)
    losses = [loss for _, _, loss in runs]
    assert losses == sorted(losses)
    for _, run, loss in runs:
        assert 0.97 * 1.5 < run.hours <= 1.5 and run.dollars <= 21
        assert loss == predicted_loss(run.parameters, run.tokens)
    # More time moves the choice to larger models.
    assert best_within(config, machine, 100, None)[0][1].parameters > runs[0][1].parameters


def run_plan(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "plan.py"), *words]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_script_needs_no_torch(config: Config) -> None:
    done = run_plan("configs/gpt2-124m.yaml", "--machine", "8xA100-80GB", "--price_per_hour", "14", "--json")
    result = json.loads(done.stdout)
    assert result["dollars"] == pytest.approx(14 * result["hours"])
    assert result["parameters"] == 124_439_808 and result["tokens"] == 9_900_130_304
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "recipe.estimate" in imported and not imported & {"torch", "transformers", "numpy"}


def test_the_script_shows_tables_and_budgets() -> None:
    table = run_plan("configs/gpt2-124m.yaml", "--table").stdout.splitlines()
    assert table[0].split() == ["machine", *SIZES]
    assert any(line.startswith("1xH100-80GB") and "544,000*" in line for line in table)
    budget = run_plan(
        "configs/gpt2-124m.yaml", "--machine", "8xA100-80GB", "--price_per_hour", "14", "--budget", "20"
    ).stdout.splitlines()
    assert "1.43 hours" in budget[0] and len(budget) == 5
    deadline = run_plan("configs/gpt2-124m.yaml", "--machine", "8xA100-80GB", "--deadline", "1h30m").stdout
    assert "within 1.50 hours" in deadline


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["configs/gpt2-124m.yaml"], "machine: missing"),
        (["configs/gpt2-124m.yaml", "--machine", "8xA100-80GB", "--budget", "20"], "budget: dollars become hours"),
        (["configs/gpt2-124m.yaml", "--machine", "8xA100-80GB", "--deadline", "soon"], "deadline: soon"),
        (["configs/gpt2-124m.yaml", "--machine", "8xA100-80GB", "--n_layr", "2"], "did you mean n_layer"),
    ],
)
def test_wrong_requests_are_refused(words: list[str], message: str) -> None:
    done = run_plan(*words)
    assert done.returncode == 2 and message in done.stderr and not done.stdout
