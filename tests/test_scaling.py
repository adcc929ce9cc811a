"""The cost of a token as GPUs grow: bytes counted on two ranks, the arithmetic by hand, indivisible batches."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch import ROOT, accelerate_command, environment
from recipe.config import Config
from recipe.estimate import parse_machine, tokens_per_second
from recipe.parsing import load_config
from recipe.plan import count_parameters, make_plan, padded_vocab_size
from recipe.scaling import exchanged_bytes, grow, step_time
from scaling_rank import CONFIG, VOCABULARY

COUNTS = (1, 2, 4, 8, 16, 64, 128, 512)


@pytest.fixture
def config() -> Config:
    return load_config([str(ROOT / "configs" / "gpt2-124m.yaml")])


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accelerate_file", ["2cpu-zero1", pytest.param("2cpu-ddp", marks=pytest.mark.slow)])
def test_the_bytes_are_those_that_two_ranks_exchange(accelerate_file: str, optimizer: str, tmp_path: Path) -> None:
    words = [*accelerate_command(accelerate_file, script=str(ROOT / "tests" / "scaling_rank.py"))]
    done = subprocess.run(
        [*words, str(tmp_path / "bytes"), optimizer], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads((tmp_path / "bytes").read_text())
    reduced, gathered = exchanged_bytes(CONFIG, 2, VOCABULARY)
    parameters = count_parameters(CONFIG, padded_vocab_size(VOCABULARY))
    assert (reduced, gathered) == (4 * parameters, 2 * parameters)
    # Beside the gradients: norms and losses, numbers of a few bytes, and the padding of partitions. Accumulation adds nothing.
    # Where the optimizer is replicated, every rank gets all of them, at twice the cost.
    collective = "reduce_scatter_tensor" if accelerate_file == "2cpu-zero1" else "all_reduce"
    assert counted.pop(collective) == pytest.approx(reduced, rel=0.01)
    gets = counted.pop("all_gather_into_tensor", 0) + counted.pop("all_gather", 0)
    if accelerate_file == "2cpu-zero1":
        assert gets == pytest.approx(gathered, rel=0.01)
    elif optimizer == "adamw":
        assert gets == 0  # every rank has all the weights
    else:
        assert 0 < gets < gathered  # those that Muon trains, which are shared out also here
    # Muon hands over the matrix that lies across the slices, at most one for each boundary.
    assert counted.pop("all_to_all_single", 0) <= (optimizer == "muon") * 4 * 4 * CONFIG.n_embd**2
    assert sum(counted.values()) < 0.01 * reduced, counted


def test_one_gpu_is_as_it_was_measured(config: Config) -> None:
    one = step_time(config, parse_machine("H100-80GB"))
    assert one.total == pytest.approx(524_288 / 570_600) and one.reducing == one.gathering == 0
    # Short steps are slower, as measured there: 118.1 ms for 65,536 tokens, 922.2 for 524,288.
    short = step_time(replace(config, batch_tokens=65_536), parse_machine("H100-80GB"))
    assert (65_536 / short.total) / 570_600 == pytest.approx(922.2 / 8 / 118.1, rel=0.005)


def test_eight_gpus_by_hand(config: Config) -> None:
    eight = step_time(replace(config, micro_batch_size=64), parse_machine("8xH100-80GB"))
    parameters = 124_475_904
    assert eight.computing == pytest.approx((524_288 / 570_600 - 3.2e-3) / 8)
    assert eight.reducing == pytest.approx(7 / 8 * 4 * parameters / 340e9 + 3 * 3 * 20e-6)
    assert eight.gathering == pytest.approx(7 / 8 * 2 * parameters / 340e9 + 3 * 3 * 20e-6)
    assert (eight.fixed, eight.optimizer) == (0.7e-3, 2.5e-3 / 8)
    speed, measured = tokens_per_second(replace(config, micro_batch_size=64), parse_machine("8xH100-80GB"))
    assert speed == pytest.approx(524_288 / eight.total) and not measured
    # Muon's products are shared out as well.
    muon = step_time(replace(config, micro_batch_size=64, optimizer="muon"), parse_machine("8xH100-80GB"))
    assert muon.optimizer == pytest.approx((2.5e-3 + 5.2e-3) / 8) and muon.computing == eight.computing
    # Between nodes the network counts.
    sixteen = step_time(replace(config, micro_batch_size=32), parse_machine("16xH100-80GB"))
    assert sixteen.reducing == pytest.approx(15 / 16 * 4 * parameters / 40e9 + 3 * 4 * 20e-6)


def test_computing_twice_costs_less_than_a_third(config: Config) -> None:
    machine = parse_machine("H100-80GB")
    ratio = step_time(replace(config, activation_checkpointing=True), machine).computing / step_time(config, machine).computing
    assert 1.2 < ratio < 4 / 3


def test_tokens_get_dearer_and_runs_faster(config: Config) -> None:
    growths = grow(config, "H100-80GB", COUNTS)
    assert [one.gpus for one in growths] == list(COUNTS)
    costs, speeds = [one.cost for one in growths], [one.tokens_per_second for one in growths]
    assert costs[0] == 1 and costs == sorted(costs) and speeds == sorted(speeds)
    assert 1.0 < costs[3] < 1.2 and costs[-1] > 5
    for one in growths:
        assert one.micro_batch_size == min(128, 512 // one.gpus)
        assert one.cost == pytest.approx(one.gpus * 570_600 / one.tokens_per_second)
    # A larger batch buys what a smaller one cannot.
    larger = grow(replace(config, batch_tokens=8 * 524_288), "H100-80GB", (512,))[0]
    assert larger.cost < costs[-1] / 4


def test_where_the_batch_ends_it_says_what_would_work(config: Config) -> None:
    twelve, many = grow(config, "H100-80GB", (12, 1024))
    for growth, batches, ranks in ((twelve, (516_096, 528_384), (8, 16)), (many, (1_048_576,), (512,))):
        assert growth.seconds is None and "; batch_tokens " in growth.problem
        for tokens in batches:
            assert str(tokens) in growth.problem
            make_plan(replace(config, batch_tokens=tokens, micro_batch_size=1), growth.gpus)
        assert f"or {' or '.join(map(str, ranks))} ranks works" in growth.problem
        for count in ranks:
            make_plan(replace(config, micro_batch_size=1), count)
    assert grow(config, "L4-24GB", (8,))[0].tokens_per_second > 0
    (small,) = grow(load_config([str(ROOT / "configs" / "gpt2-1558m.yaml")]), "L4-24GB", (1,))
    assert small.problem == "does not fit"


def test_the_script_shows_it() -> None:
    words = [sys.executable, str(ROOT / "scripts" / "plan.py"), "configs/gpt2-124m.yaml", "--machine", "H100-80GB"]

    def plan(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*words, *more], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)

    lines = plan("--growth", "1,64,512,1024").stdout.splitlines()
    assert len(lines) == 5 and re.match(r" +1 +128 +570,600 ", lines[1]) and lines[1].endswith("x 1.00")
    assert "or 512 ranks works" in lines[4]
    found = json.loads(plan("--growth", "8", "--json").stdout)
    assert found[0]["gpus"] == 8 and set(found[0]["seconds"]) == {"computing", "fixed", "optimizer", "reducing", "gathering"}
    refused = plan("--growth", "many")
    assert refused.returncode == 2 and "growth: many is not a list" in refused.stderr
