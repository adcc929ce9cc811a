"""The derived numbers: parameters, accumulation, warm-up, steps, FLOPs; checked by hand and against the real model."""

import random
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from recipe.config import Config, ConfigError
from recipe.gpus import peak_flops, power_limit
from recipe.plan import count_parameters, flops_per_token, load_run, make_plan

PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def make_config(**fields) -> Config:
    """A configuration of 1000 steps of 64 tokens without warm-up, changed by `fields`."""
    values = {"max_steps": 1000, "warmup_steps": 0.0, "sequence_length": 32, "micro_batch_size": 2, "batch_tokens": 64}
    values |= fields
    return Config(**{"n_positions": values["sequence_length"]} | values)


def problems_of(config: Config, ranks: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_plan(config, ranks)
    return caught.value.problems


def load_problems(*arguments: str, ranks: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(["--data", "installed-docs", *arguments], ranks)
    return caught.value.problems


# --- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, heads, width, expected",
    [(12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080), (48, 25, 1600, 1_557_611_200)],
)
def test_parameters_of_the_four_gpt2(layers, heads, width, expected):
    config = make_config(n_layer=layers, n_head=heads, n_embd=width, n_positions=1024)
    assert count_parameters(config, 50_257) == expected


@pytest.mark.parametrize("seed", range(4))
def test_parameters_are_those_of_the_real_model(seed):
    rng = random.Random(seed)
    heads = rng.randint(1, 8)
    config = make_config(
        n_layer=rng.randint(1, 4), n_head=heads, n_embd=heads * rng.randint(1, 30), n_positions=rng.randint(32, 999)
    )
    vocab_size = rng.randint(257, 60_000)
    with torch.device("meta"):
        model = GPT2LMHeadModel(gpt2_config(config, vocab_size))
    assert count_parameters(config, vocab_size) == sum(p.numel() for p in model.parameters())


def gpt2_config(config: Config, vocab_size: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_positions=config.n_positions,
        attn_implementation="eager",
    )


# --- accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_tokens, micro_batch_size, sequence_length, ranks, accumulation, rows",
    [
        (524_288, 64, 1024, 8, 1, 512),
        (524_288, 64, 1024, 1, 8, 512),
        (524_288, 16, 1024, 4, 8, 512),
        (8192, 8, 256, 2, 2, 32),
        (64, 2, 32, 1, 1, 2),
        (60, 1, 3, 5, 4, 20),
    ],
)
def test_accumulation(batch_tokens, micro_batch_size, sequence_length, ranks, accumulation, rows):
    config = make_config(batch_tokens=batch_tokens, micro_batch_size=micro_batch_size, sequence_length=sequence_length)
    plan = make_plan(config, ranks)
    assert (plan.accumulation, plan.rows_per_step, plan.num_processes) == (accumulation, rows, ranks)
    assert (plan.tokens_per_step, plan.total_tokens) == (batch_tokens, 1000 * batch_tokens)
    assert plan.rows_per_step == micro_batch_size * accumulation * ranks


def remedies(problem: str) -> dict[str, list[int]]:
    """The values that the message about an indivisible batch proposes, by field."""
    match = re.search(
        r"; batch_tokens (\d+)(?: or (\d+))?(?:, or micro_batch_size (\d+))?(?:, or (\d+)(?: or (\d+))? ranks)? works$",
        problem,
    )
    assert match, problem
    lower, upper, micro, fewer, more = match.groups()
    return {
        "batch_tokens": [int(n) for n in (lower, upper) if n],
        "micro_batch_size": [int(micro)] if micro else [],
        "ranks": [int(n) for n in (fewer, more) if n],
    }


def test_an_indivisible_batch_is_explained():
    (problem,) = problems_of(make_config(batch_tokens=1000, micro_batch_size=4), 2)
    assert problem == (
        "batch_tokens: 1000 is not a multiple of micro_batch_size 4 x sequence_length 32 x 2 ranks = 256; "
        "batch_tokens 768 or 1024 works"
    )
    (problem,) = problems_of(make_config(batch_tokens=960, micro_batch_size=4), 2)
    assert remedies(problem) == {"batch_tokens": [768, 1024], "micro_batch_size": [3], "ranks": []}


def test_a_batch_smaller_than_a_micro_step_is_explained():
    (problem,) = problems_of(make_config(batch_tokens=128, micro_batch_size=8), 2)
    assert remedies(problem) == {"batch_tokens": [512], "micro_batch_size": [2], "ranks": []}


@pytest.mark.parametrize("seed", range(5))
def test_the_proposed_values_work(seed):
    rng, refused = random.Random(seed), 0
    while refused < 40:
        fields = {
            "batch_tokens": rng.randint(1, 5000),
            "micro_batch_size": rng.randint(1, 9),
            "sequence_length": rng.randint(1, 40),
        }
        ranks = rng.choice([1, 2, 3, 8])
        try:
            make_plan(make_config(**fields), ranks)
        except ConfigError as error:
            (problem,) = error.problems
            refused += 1
        else:
            continue
        proposed = remedies(problem)
        for name, values in proposed.items():
            for value in values:
                changed = {} if name == "ranks" else {name: value}
                make_plan(make_config(**fields | changed), value if name == "ranks" else ranks)
        step = fields["micro_batch_size"] * fields["sequence_length"] * ranks
        assert all(abs(n - fields["batch_tokens"]) <= step for n in proposed["batch_tokens"])
        smaller = [
            n
            for n in range(1, fields["micro_batch_size"])
            if fields["batch_tokens"] % (n * fields["sequence_length"] * ranks) == 0
        ]
        assert proposed["micro_batch_size"] == smaller[-1:]


# --- steps and warm-up --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens, steps", [(1, 1), (63, 1), (64, 1), (65, 2), (6400, 100), (6401, 101)])
def test_max_tokens_rounds_up_to_whole_steps(max_tokens, steps):
    plan = make_plan(make_config(max_steps=None, max_tokens=max_tokens), 1)
    assert (plan.max_steps, plan.total_tokens) == (steps, steps * 64)


@pytest.mark.parametrize(
    "warmup, steps, expected",
    [(0, 1000, 0), (1, 1000, 1), (700, 1000, 700), (999, 1000, 999), (0.01, 1000, 10), (0.5, 7, 4), (0.999, 10_000, 9990)],
)
def test_warmup_is_a_count_or_a_share(warmup, steps, expected):
    assert make_plan(make_config(warmup_steps=float(warmup), max_steps=steps), 1).warmup_steps == expected


def test_warmup_share_counts_the_steps_of_max_tokens():
    assert make_plan(make_config(warmup_steps=0.1, max_steps=None, max_tokens=64 * 99 + 1), 1).warmup_steps == 10


def test_a_fractional_count_of_warmup_steps_is_refused():
    assert problems_of(make_config(warmup_steps=1.5)) == ["warmup_steps: 1.5 is neither a whole number nor a share below 1"]


@pytest.mark.parametrize("warmup, steps", [(1000, 1000), (700, 100), (0.9999, 10), (2, 2)])
def test_a_warmup_that_does_not_fit_is_refused(warmup, steps):
    (problem,) = problems_of(make_config(warmup_steps=float(warmup), max_steps=steps))
    assert re.match(rf"warmup_steps: \d+ steps of warm-up do not fit a run of {steps} steps", problem)


@pytest.mark.parametrize("decay, expected", [(0, 0), (1, 1), (300, 300), (0.2, 200), (0.5, 500), (990, 990)])
def test_decay_is_a_count_or_a_share_of_a_trapezoidal_run(decay, expected):
    fields = {"decay_steps": float(decay), "warmup_steps": 10.0}
    plan = make_plan(make_config(schedule="trapezoidal", **fields), 1)
    assert plan.decay_steps == expected
    assert (f", {expected} decay)" in "\n".join(plan.lines(make_config(), None))) == (expected > 0)
    plan = make_plan(make_config(schedule="linear", **fields), 1)
    assert plan.decay_steps == 0 and "decay" not in "\n".join(plan.lines(make_config(), None))


@pytest.mark.parametrize("warmup, decay", [(10, 991), (0, 1001), (0.5, 0.6), (900, 0.2)])
def test_a_decay_that_does_not_fit_is_refused(warmup, decay):
    fields = {"warmup_steps": float(warmup), "decay_steps": float(decay)}
    (problem,) = problems_of(make_config(schedule="trapezoidal", **fields))
    assert re.match(r"decay_steps: \d+ steps of warm-up and \d+ of decay do not fit a run of 1000 steps", problem)
    assert make_plan(make_config(schedule="cosine", **fields), 1).decay_steps == 0


def test_a_fractional_count_of_decay_steps_is_refused():
    (problem,) = problems_of(make_config(decay_steps=2.5, schedule="trapezoidal"))
    assert problem == "decay_steps: 2.5 is neither a whole number nor a share below 1"


def test_one_step_may_be_all_warmup():
    assert make_plan(make_config(warmup_steps=1.0, max_steps=1), 1).warmup_steps == 1


def test_problems_of_the_plan_come_at_once():
    problems = problems_of(make_config(batch_tokens=65, warmup_steps=1000.0))
    assert [p.partition(":")[0] for p in problems] == ["batch_tokens", "warmup_steps"]


# --- batch ramp ---------------------------------------------------------------------------------------------------


def test_a_ramp_by_hand():
    config = make_config(batch_tokens=512, batch_ramp="64x3,128x2", max_steps=10)
    plan = make_plan(config, 1)
    assert [plan.tokens_at(step) for step in range(8)] == [64, 64, 64, 128, 128, 512, 512, 512]
    assert [plan.rows_at(step) for step in (0, 3, 5, 99)] == [2, 4, 16, 16]
    assert [plan.tokens_after(steps) for steps in (0, 1, 3, 4, 5, 6, 10)] == [0, 64, 192, 320, 448, 960, 3008]
    assert plan.total_tokens == 3008
    assert "batch ramp        64 tokens for 3 steps, then 128 tokens for 2 steps" in plan.lines(config, 300)


@pytest.mark.parametrize("ramp", [None, "64x1", "64x3,128x2", "192x7", "512x100"])
@pytest.mark.parametrize("max_tokens", [1, 64, 65, 191, 192, 193, 447, 448, 449, 10_000])
def test_the_steps_of_a_ramp_are_the_fewest_that_reach_max_tokens(ramp, max_tokens):
    plan = make_plan(make_config(batch_tokens=512, batch_ramp=ramp, max_steps=None, max_tokens=max_tokens), 1)
    assert plan.tokens_after(plan.max_steps) == plan.total_tokens >= max_tokens > plan.tokens_after(plan.max_steps - 1)


def test_tokens_after_is_the_sum_of_tokens_at():
    plan = make_plan(make_config(batch_tokens=512, batch_ramp="64x3,128x2,320x4"), 1)
    assert [plan.tokens_after(n) for n in range(20)] == [sum(map(plan.tokens_at, range(n))) for n in range(20)]
    assert all(plan.rows_at(step) * 32 == plan.tokens_at(step) for step in range(20))


def test_a_batch_of_the_ramp_that_does_not_divide_is_refused():
    (problem,) = problems_of(make_config(batch_tokens=512, batch_ramp="64x3,100x2,128x1"))
    assert problem == "batch_ramp: 100 is not a multiple of micro_batch_size x sequence_length x ranks = 64; 64 or 128 works"


# --- load_run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_give_a_plan(path):
    config, plan = load_run([str(path)], 1)
    assert plan.total_tokens >= (config.max_tokens or 0)


def test_the_124m_preset_is_llm_c():
    path = next(p for p in PRESETS if p.stem == "gpt2-124m")
    config, plan = load_run([str(path), "--micro_batch_size", "64"], 8)
    assert count_parameters(config, 50_257) == 124_439_808
    assert (plan.accumulation, plan.max_steps, plan.warmup_steps) == (1, 18_883, 700)


def test_problems_of_fields_plan_and_paths_come_at_once(tmp_path):
    missing = str(tmp_path / "missing")
    arguments = ["--max_steps", "10", "--n_layers", "3", "--batch_tokens", "100", "--validation_data", missing]
    with pytest.raises(ConfigError) as caught:
        load_run([*arguments, "--data", f"{missing}.txt"], 1)
    names = [p.partition(":")[0] for p in caught.value.problems]
    assert sorted(names) == ["batch_tokens", "data", "n_layers", "validation_data", "warmup_steps"]


def test_an_indivisible_batch_shows_without_the_length_of_the_run():
    names = [p.partition(":")[0] for p in load_problems("--batch_tokens", "100")]
    assert sorted(names) == ["batch_tokens", "max_steps"]


@pytest.mark.parametrize(
    "name, value, shown, least",
    [
        ("micro_batch_size", "0", "0", 1),
        ("micro_batch_size", "-1", "-1", 1),
        ("sequence_length", "0", "0", 1),
        ("batch_tokens", "0", "0", 1),
        ("batch_tokens", "-100", "-100", 1),
        ("max_tokens", "0", "0", 1),
        ("max_tokens", "-5", "-5", 1),
        ("warmup_steps", "-1", "-1.0", 0),
    ],
)
def test_a_number_out_of_range_is_one_problem(name, value, shown, least):
    length = [] if name == "max_tokens" else ["--max_steps", "1000"]
    assert load_problems(*length, f"--{name}", value) == [f"{name}: {shown} is below {least}"]


@pytest.mark.parametrize("value", ["1e999", "1e300"])
def test_an_endless_warmup_is_a_problem_not_a_crash(value):
    problems = load_problems("--max_steps", "1000", "--warmup_steps", value)
    assert len(problems) == 1 and problems[0].startswith("warmup_steps: ")


# --- evaluate_data shows up front, not after days of training ------------------------------------------------------


@pytest.mark.parametrize("value", ["missing.jsonl", "eval/missing", "/missing", "folder"])
def test_evaluate_data_must_be_a_file(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("{}\n")
    (problem,) = load_problems("--max_steps", "1000", "--evaluate_data", value)
    assert problem.startswith(f"evaluate_data: {value} ") and "jsonl" in problem and "USER/NAME" not in problem


@pytest.mark.parametrize("value", ["mini", "items.jsonl", "."])
def test_evaluate_data_that_is_there(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "items.jsonl").write_text("{}\n")
    load_run(["--data", "installed-docs", "--max_steps", "1000", "--evaluate_data", value], 1)


def test_evaluate_data_stands_for_hellaswag_alone():
    (problem,) = load_problems("--max_steps", "1000", "--evaluate_data", "mini", "--evaluate_tasks", "lambada_openai")
    assert problem.startswith("evaluate_data: ") and "hellaswag" in problem


# --- lines --------------------------------------------------------------------------------------------------------


def test_lines_show_the_numbers():
    config = make_config(n_layer=1, n_head=2, n_embd=16, batch_tokens=384, micro_batch_size=2, warmup_steps=0.01)
    lines = make_plan(config, 3).lines(config, 300)
    assert [" ".join(line.split()) for line in lines] == [
        f"parameters {300 * 16 + 32 * 16 + 12 * 256 + 13 * 16 + 32:,}",
        "ranks 3",
        "tokens a step 384 (2 rows x 32 tokens x 3 ranks x 2 accumulation)",
        "steps 1,000 (10 of them warm-up)",
        "tokens in all 384,000",
    ]


def test_lines_say_that_a_vocabulary_is_assumed():
    config = make_config(n_positions=1024)
    assert make_plan(config, 1).lines(config, None)[0].split(maxsplit=1)[1] == (
        "124,439,808  (assuming GPT-2's vocabulary of 50,257)"
    )


# --- FLOPs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, heads, width, length", [(1, 2, 16, 32), (3, 4, 32, 48)])
def test_flops_are_those_of_the_real_model_less_the_half_that_causal_attention_saves(layers, heads, width, length):
    config = make_config(n_layer=layers, n_head=heads, n_embd=width, sequence_length=length)
    model = GPT2LMHeadModel(gpt2_config(config, 300))
    rows = torch.randint(300, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=rows).logits.sum().backward()
    saved = 6 * layers * width * length  # of the 12LCT that eager attention spends
    assert counter.get_total_flops() == rows.numel() * (flops_per_token(config, 300) + saved)


def test_flops_of_124m_by_hand():
    config = make_config(n_layer=12, n_head=12, n_embd=768, sequence_length=1024)
    matrices = 12 * (768 * 2304 + 768 * 768 + 768 * 3072 + 3072 * 768) + 50_257 * 768
    assert flops_per_token(config, 50_257) == 6 * matrices + 6 * 12 * 768 * 1024


@pytest.mark.parametrize(
    "name, peak, watts",
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 700),
        ("NVIDIA H100 PCIe", 756e12, 350),
        ("NVIDIA H100 NVL", 835e12, 400),
        ("NVIDIA H200", 989e12, 700),
        ("NVIDIA H200 NVL", 835e12, 600),
        ("NVIDIA A100-SXM4-80GB", 312e12, 400),
        ("NVIDIA A100-SXM-80GB", 312e12, 400),
        ("NVIDIA A100-PCIE-40GB", 312e12, 250),
        ("NVIDIA A100 80GB PCIe", 312e12, 300),
        ("A100", 312e12, None),
        ("NVIDIA L4", 121e12, 72),
        ("NVIDIA L40S", 362e12, 350),
        ("NVIDIA GeForce RTX 4090", 165e12, 450),
    ],
)
def test_known_gpus(name, peak, watts):
    assert (peak_flops(name), power_limit(name)) == (peak, watts)


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-16GB", "NVIDIA H20", "NVIDIA A10", "Quadro X", ""])
def test_peak_flops_of_unknown_gpus(name):
    assert peak_flops(name) is None and power_limit(name) is None


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA RTX A1000"])
def test_a_gpu_whose_name_begins_like_a_known_one_is_unknown(name):
    assert peak_flops(name) not in (121e12, 312e12)  # L4's and A100's
