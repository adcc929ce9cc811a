"""The configuration: YAML then command line, strict types, every problem at once, and nothing heavy imported for it."""

import dataclasses
import random
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml

from recipe.config import NOT_PART_OF_THE_RUN, Config, ConfigError, config_fields, field_docs, parse_ranges, to_yaml
from recipe.parsing import PATH_FIELDS, help_text, load_config, parse_config

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
STEPS = ["--max_steps", "1000"]


def problems_of(arguments: list[str]) -> list[str]:
    """The problems that load_config raises, [] if none."""
    try:
        load_config(arguments)
    except ConfigError as error:
        assert str(error).splitlines() == error.problems
        return error.problems
    return []


def the_problem(arguments: list[str]) -> str:
    """The only problem of the arguments."""
    problems = problems_of(arguments)
    assert len(problems) == 1, problems
    return problems[0]


@pytest.fixture
def write(tmp_path):
    """Writes YAML and gives the argument for it."""

    def write(text: str, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# --- where values come from ---------------------------------------------------------------------------------------


def test_defaults_without_a_file():
    config = load_config(STEPS)
    assert config == Config(max_steps=1000, n_positions=1024, output_dir="runs/run")


def test_command_line_overrides_yaml_overrides_default(write):
    config = load_config([write("n_layer: 3\nn_head: 4\nmax_steps: 800\n"), "--n_layer", "5"])
    assert (config.n_layer, config.n_head, config.n_embd, config.max_steps) == (5, 4, 768, 800)


def test_options_may_stand_before_the_file(write):
    assert load_config(["--n_layer", "5", write("n_layer: 3\nmax_steps: 800\n")]).n_layer == 5


def test_field_equals_value():
    assert load_config([*STEPS, "--n_layer=5", "--data=a=b.txt"]).n_layer == 5
    assert load_config([*STEPS, "--n_layer=5", "--data=a=b.txt"]).data == "a=b.txt"


def test_values_may_begin_with_one_dash_or_after_equals_with_two():
    assert load_config([*STEPS, "--text_column", "-x"]).text_column == "-x"
    assert load_config([*STEPS, "--text_column=--x"]).text_column == "--x"


def test_a_tilde_is_the_home_also_where_no_shell_sees_it(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config([str(write("tokenizer: ~/tok\nresume: ~/step\nmax_steps: 1\n")), "--output_dir=~/runs/x"])
    assert (config.output_dir, config.tokenizer, config.resume) == ("/home/me/runs/x", "/home/me/tok", "/home/me/step")


def test_output_dir_follows_the_name_of_the_file(write):
    config = load_config([write("max_steps: 800", "my.run.yaml")])
    assert (config.name, config.output_dir) == ("my.run", "runs/my.run")
    assert load_config([write("max_steps: 800\noutput_dir: there\n")]).output_dir == "there"


def test_positions_follow_the_sequence_length():
    assert load_config([*STEPS, "--sequence_length", "96"]).n_positions == 96
    assert load_config([*STEPS, "--sequence_length", "96", "--n_positions", "128"]).n_positions == 128


def test_an_empty_file_means_defaults(write):
    assert load_config([write("# nothing\n"), *STEPS]).n_layer == 12


# --- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("n_layer", "12", 12),
        ("n_layer", "'12'", 12),
        ("batch_tokens", "524_288", 524_288),
        ("learning_rate", "6e-4", 6e-4),  # a string to PyYAML
        ("learning_rate", "6.0e-4", 6e-4),
        ("learning_rate", "1E-3", 1e-3),
        ("learning_rate", "1", 1.0),
        ("learning_rate", ".5", 0.5),
        ("warmup_steps", "0.01", 0.01),
        ("warmup_steps", "70", 70.0),
        ("evaluate_limit", "null", None),
        ("evaluate_limit", "~", None),
        ("evaluate_limit", "", None),
        ("validation_data", "null", None),
        ("compile", "null", None),
        ("compile", "true", True),
        ("compile", "False", False),
        ("compile", "'true'", True),
        ("schedule", "linear", "linear"),
        ("resume", "none", "none"),
        ("evaluate_tasks", "none", "none"),
        ("text_column", "'null'", "null"),
        ("dry_run", "true", True),
    ],
)
def test_accepted_in_yaml(write, name, text, value):
    read = getattr(load_config([write(f"max_steps: 800\n{name}: {text}\n")]), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "name, word, value",
    [
        ("n_layer", "12", 12),
        ("batch_tokens", "524_288", 524_288),
        ("learning_rate", "6e-4", 6e-4),
        ("learning_rate", "1", 1.0),
        ("learning_rate", "1.", 1.0),
        ("warmup_steps", "1_000", 1000.0),
        ("evaluate_limit", "null", None),
        ("validation_data", "null", None),
        ("text_column", "null", "null"),  # not optional: a column of that name
        ("output_dir", "2024", "2024"),
        ("compile", "null", None),
        ("compile", "true", True),
        ("compile", "FALSE", False),
        ("schedule", "constant", "constant"),
    ],
)
def test_accepted_on_the_command_line(name, word, value):
    read = getattr(load_config([*STEPS, f"--{name}", word]), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("n_layer", "1.5", "a whole number"),
        ("n_layer", "12.0", "a whole number"),
        ("n_layer", "1e1", "a whole number"),
        ("n_layer", "true", "a whole number"),
        ("n_layer", "null", "a whole number"),
        ("n_layer", "twelve", "a whole number"),
        ("n_layer", "[12]", "a whole number"),
        ("n_layer", "{a: 1}", "a whole number"),
        ("evaluate_limit", "1.5", "a whole number or null"),
        ("learning_rate", "true", "a number"),
        ("learning_rate", "null", "a number"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", "6e", "a number"),
        ("data", "12", "a text"),
        ("data", "''", "a text"),
        ("data", "null", "a text"),
        ("data", "[a, b]", "a text"),
        ("validation_data", "12", "a text or null"),
        ("compile", "1", "true or false or null"),
        ("compile", "maybe", "true or false or null"),
        ("dry_run", "null", "true or false"),
        ("schedule", "Cosine", "one of constant, cosine, linear, trapezoidal"),
        ("schedule", "null", "one of constant, cosine, linear, trapezoidal"),
        ("schedule", "[linear]", "one of constant, cosine, linear, trapezoidal"),
        ("precision", "fp16", "one of auto, bf16, fp32"),
    ],
)
def test_refused_in_yaml(write, name, text, expected):
    path = write(f"max_steps: 800\n{name}: {text}\n")
    problem = the_problem([path])
    assert problem == f"{name}: {yaml.safe_load(text)!r} ({path}) is not {expected}"


@pytest.mark.parametrize(
    "name, word, expected",
    [
        ("n_layer", "1.5", "a whole number"),
        ("n_layer", "true", "a whole number"),
        ("n_layer", "0x10", "a whole number"),
        ("n_layer", "1__0", "a whole number"),
        ("n_layer", " 1", "a whole number"),
        ("n_layer", "null", "a whole number"),
        ("learning_rate", "nan", "a number"),
        ("learning_rate", "inf", "a number"),
        ("learning_rate", "1,5", "a number"),
        ("learning_rate", "1__", "a number"),
        ("compile", "yes", "true or false or null"),
        ("compile", "1", "true or false or null"),
        ("optimizer", "sgd", "one of adamw, muon"),
        ("muon_ns_dtype", "fp16", "one of auto, bf16, fp32"),
        ("muon_variant", "adamuon", "one of muon, normuon"),
        ("muon_polynomial", "cubic", "one of quintic, polar_express"),
        ("muon_momentum_warmup_steps", "0.5", "a whole number"),
    ],
)
def test_refused_on_the_command_line(name, word, expected):
    assert the_problem([*STEPS, f"--{name}", word]) == f"{name}: {word!r} (command line) is not {expected}"


def test_an_empty_value_is_refused():
    assert the_problem([*STEPS, "--data="]).startswith("data: '' (command line)")


@pytest.mark.parametrize("words", [["--max_steps", "many"], ["--max_tokens", "1.5"]])
def test_a_wrong_length_is_one_problem(words):
    assert "is not a whole number" in the_problem(words)


@pytest.mark.parametrize("words, expected", [([], True), (["true"], True), (["False"], False)])
def test_dry_run_needs_no_value(words, expected):
    assert load_config([*STEPS, "--dry_run", *words]).dry_run is expected


def test_dry_run_leaves_the_next_word_alone(write):
    config = load_config(["--dry_run", write("max_steps: 800\nn_layer: 3\n")])
    assert config.dry_run and config.n_layer == 3
    assert load_config([*STEPS, "--dry_run", "--n_layer", "5"]).n_layer == 5
    assert "dry_run" in the_problem([*STEPS, "--dry_run=maybe"])


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, nearest", [("n_layers", "n_layer"), ("lerning_rate", "learning_rate"), ("batch-tokens", "batch_tokens")]
)
def test_an_unknown_field_names_the_nearest(write, name, nearest):
    path = write(f"max_steps: 800\n{name}: 3\n")
    assert the_problem([path]) == f"{name}: unknown field ({path}); did you mean {nearest}?"
    assert the_problem([*STEPS, f"--{name}", "3"]) == f"{name}: unknown field (command line); did you mean {nearest}?"


@pytest.mark.parametrize("name", ["zzzzzzzz", ""])
def test_a_field_like_no_other_points_at_the_help(name):
    assert the_problem([*STEPS, f"--{name}", "3"]) == f"{name}: unknown field (command line); --help lists the fields"


@pytest.mark.parametrize("name", ["n_lay", "learning", "max_step", "data_work"])
def test_abbreviations_are_refused(name):
    config, problems = parse_config([*STEPS, f"--{name}", "3"])
    assert len(problems) == 1 and "unknown field" in problems[0]
    assert config == load_config(STEPS)


def test_the_name_of_the_run_is_no_field(write):
    assert "unknown field" in the_problem([write("max_steps: 800\nname: mine\n")])
    assert "unknown field" in the_problem([*STEPS, "--name", "mine"])
    assert "--name " not in help_text("pretrain.py")


def test_a_key_twice_in_yaml_is_refused(write):
    problems = problems_of([write("n_layer: 3\nn_head: 3\nn_layer: 3\nmax_steps: 800\n")])
    assert "n_layer is given twice" in problems[0] and "line 1" in problems[0]


def test_a_flag_twice_is_refused():
    assert the_problem([*STEPS, "--n_layer", "3", "--n_layer=3"]) == "n_layer: given twice on the command line"
    assert the_problem([*STEPS, "--dry_run", "--dry_run"]) == "dry_run: given twice on the command line"


@pytest.mark.parametrize("words", [["--n_layer"], ["--n_layer", "--n_head", "12"]])
def test_a_missing_value_is_named(words):
    assert the_problem([*STEPS, *words]) == "n_layer: no value given on the command line; write --n_layer VALUE"


def test_a_stray_word_is_refused(write):
    assert the_problem([write("max_steps: 800"), "12"]).startswith("12: a second config file or a stray word")


# --- files that are no configuration ------------------------------------------------------------------------------


def test_a_missing_file_is_one_problem(tmp_path):
    path = str(tmp_path / "missing.yaml")
    assert the_problem([path]) == f"{path}: no such config file; the presets are in configs/"


def test_a_folder_is_no_config_file(tmp_path):
    assert "no such config file" in the_problem([str(tmp_path), *STEPS])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("- n_layer\n- 3\n", "expected `field: value` lines, found list"),
        ("n_layer\n", "expected `field: value` lines, found str"),
        ("12\n", "expected `field: value` lines, found int"),
        ("n_layer: [3\n", "not valid YAML"),
        ("n_layer: 3\n n_head: 3\n", "not valid YAML"),
        ("n_layer:\t3\n\tn_head: 3\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_file_that_holds_no_fields(write, text, expected):
    path = write(text)
    problem = the_problem([path, *STEPS])
    assert problem.startswith(f"{path}: {expected}") and "\n" not in problem


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("data: naïve.txt\n".encode("latin-1"))
    assert the_problem([str(path), *STEPS]).startswith(f"{path}: not valid YAML")


# --- max_steps and max_tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words, expected",
    [
        ("max_steps: 800", ["--max_tokens", "64"], (None, 64)),
        ("max_tokens: 64", ["--max_steps", "800"], (800, None)),
        ("max_steps: 800", ["--max_steps", "900"], (900, None)),
        ("max_tokens: 64", [], (None, 64)),
        ("max_steps: null\nmax_tokens: 64", [], (None, 64)),
        ("max_steps: 800\nmax_tokens: null", [], (800, None)),
        ("max_tokens: 64", ["--max_steps", "null"], (None, 64)),
    ],
)
def test_the_length_of_the_run(write, text, words, expected):
    config = load_config([write(text), *words])
    assert (config.max_steps, config.max_tokens) == expected


def test_both_lengths_at_one_level_are_refused(write):
    path = write("max_steps: 800\nmax_tokens: 64\n")
    assert the_problem([path]) == f"max_steps and max_tokens: {path} gives both; keep one"
    assert the_problem(["--max_steps", "8", "--max_tokens", "64"]) == "--max_steps and --max_tokens: both given; keep one"


def test_no_length_is_refused():
    assert the_problem([]) == "max_steps: neither max_steps nor max_tokens is set; give one"


# --- ranges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, word, expected",
    [
        ("n_layer", "0", "n_layer: 0 is below 1"),
        ("n_head", "0", "n_head: 0 is below 1"),
        ("max_steps", "0", "max_steps: 0 is below 1"),
        ("n_positions", "0", "n_positions: 0 is below 1"),
        ("sequence_length", "0", "sequence_length: 0 is below 1"),
        ("data_workers", "-1", "data_workers: -1 is below 0"),
        ("learning_rate", "-1e-3", "learning_rate: -0.001 is below 0"),
        ("keep_checkpoints", "0", "keep_checkpoints: 0 is below 1"),
        ("evaluate_limit", "0", "evaluate_limit: 0 is below 1"),
        ("z_loss", "-1e-4", "z_loss: -0.0001 is below 0"),
        ("embedding_learning_rate", "-1", "embedding_learning_rate: -1.0 is below 0"),
        ("beta1", "-0.1", "beta1: -0.1 is below 0"),
        ("beta2", "1", "beta2: 1.0 must be below 1"),
        ("muon_learning_rate", "-0.02", "muon_learning_rate: -0.02 is below 0"),
        ("muon_momentum", "1", "muon_momentum: 1.0 must be below 1"),
        ("muon_ns_steps", "0", "muon_ns_steps: 0 is below 1"),
        ("decay_steps", "-1", "decay_steps: -1.0 is below 0"),
    ],
)
def test_a_value_out_of_range_is_one_problem(name, word, expected):
    words = [f"--{name}", word]
    assert the_problem(words if name == "max_steps" else [*STEPS, *words]).startswith(expected)


@pytest.mark.parametrize("name", ["learning_rate", "warmup_steps", "weight_decay", "beta1", "epsilon", "max_grad_norm"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_must_be_finite(write, name, value):
    assert name in the_problem([write(f"max_steps: 800\n{name}: {value}\n")])


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "1e999"],
        ["--seed", str(2**64)],  # torch.manual_seed takes 64 bits
        ["--tokenizer", "train:" + "9" * 5000],  # more digits than int() reads
    ],
    ids=["infinite", "seed", "digits"],
)
def test_numbers_too_large(words):
    assert words[0].removeprefix("--") in the_problem([*STEPS, *words])


@pytest.mark.parametrize("ramp", ["64", "64x", "x3", "64x3,", "64x3x2", "64x-1", "0x3", "64:3", "a lot"])
def test_a_batch_ramp_that_is_none(ramp):
    problem = the_problem([*STEPS, "--batch_ramp", ramp])
    assert problem == f"batch_ramp: {ramp!r} is not a list of TOKENSxSTEPS; write it as 131072x1000,262144x500"


def test_weights_start_from_a_model_or_at_zero():
    both = [*STEPS, "--zero_init_projections", "true", "--init_from", "gpt2"]
    assert the_problem(both) == "zero_init_projections: the weights of init_from are not random ones; drop one of the two"
    assert not problems_of(both[:-2]) and not problems_of([*STEPS, "--init_from", "gpt2"])


@pytest.mark.parametrize("steps", ["0", "-3", "4,", "4,0", "4-9", "a lot"])
def test_steps_to_save_at_that_are_none(steps):
    assert the_problem([*STEPS, "--save_at", steps]) == f"save_at: {steps!r} is not a list of steps; write it as 229,458"


def test_heads_must_divide_the_width():
    assert the_problem([*STEPS, "--n_head", "7"]).startswith("n_head: 7 heads do not divide n_embd 768; ")


def test_a_sequence_must_fit_the_positions():
    problem = the_problem([*STEPS, "--sequence_length", "64", "--n_positions", "32"])
    assert problem == "sequence_length: 64 is longer than n_positions 32; raise n_positions"
    assert not problems_of([*STEPS, "--sequence_length", "64", "--n_positions", "64"])


@pytest.mark.parametrize("size", ["256", "65537", "", "abc", "-300", "300.5", "1e3"])
def test_vocabulary_sizes_that_cannot_be(size):
    problem = the_problem([*STEPS, "--tokenizer", f"train:{size}"])
    assert problem == f"tokenizer: train:{size}: VOCAB_SIZE must be a whole number from 257 to 65536"


@pytest.mark.parametrize(
    "text, ranges",
    [
        (None, []),
        ("0", [(0, 0)]),
        ("7-7", [(7, 7)]),
        ("1200-1263,5000", [(1200, 1263), (5000, 5000)]),
        ("3, 1-2", [(3, 3), (1, 2)]),
    ],
)
def test_skipped_rows(text, ranges):
    assert parse_ranges(text) == ranges
    assert not problems_of([*STEPS, *([f"--skip_rows={text}"] if text else [])])


@pytest.mark.parametrize("text", ["5-3", "-5", "5-", "a", "1,,2", "1-2-3", "1.5", "1:2", ","])
def test_skipped_rows_that_are_none(text):
    assert the_problem([*STEPS, f"--skip_rows={text}"]).startswith(f"skip_rows: {text!r} is not a list of ranges; ")


@pytest.mark.parametrize("size", ["257", "65536", "4_096"])
def test_vocabulary_sizes_that_can_be(size):
    assert not problems_of([*STEPS, "--tokenizer", f"train:{size}"])


def test_all_problems_come_at_once(write):
    path = write("n_layers: 3\nn_head: 1.5\nschedule: steep\nbeta1: 2\n")
    problems = problems_of([path, "--sequence_length", "-4", "--foo", "1", "--n_embd", "many", "stray", "--seed"])
    text = "\n".join(problems)
    for name in "n_layers n_head schedule beta1 sequence_length foo n_embd stray seed max_steps".split():
        assert sum(p.startswith(f"{name}: ") for p in problems) == 1, (name, text)
    assert len(problems) == 10, text


# --- what is documented -------------------------------------------------------------------------------------------


def test_every_field_is_described():
    docs, lines = field_docs(), help_text("pretrain.py").splitlines()
    for name in config_fields():
        assert docs[name].endswith("."), name
        (position,) = [n for n, line in enumerate(lines) if line.startswith(f"  --{name}  ")]
        assert "(default: " in lines[position] and lines[position + 1] == f"      {docs[name]}"


def test_help_names_the_default_and_the_choices():
    text = help_text("pretrain.py")
    assert text.startswith("usage: pretrain.py [CONFIG.yaml] [--field value ...] [--dry_run]\n")
    assert "\n  --schedule  one of constant, cosine, linear, trapezoidal (default: cosine)\n" in text
    assert "\n  --n_positions  a whole number or null (default: None)\n" in text


def test_fields_come_by_section():
    names = list(config_fields())
    assert names[0] == "data" and names[-1] == "dry_run"
    assert names.index("data_workers") < names.index("n_layer") < names.index("optimizer") < names.index("batch_tokens")
    assert set(names) == {f.name for f in dataclasses.fields(Config)} - {"name"}


def test_what_is_not_part_of_the_run_exists():
    assert {f.name for f in dataclasses.fields(Config)} >= NOT_PART_OF_THE_RUN
    for name in "data tokenizer sequence_length seed learning_rate batch_tokens n_layer precision max_steps".split():
        assert name not in NOT_PART_OF_THE_RUN


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load(path):
    assert not problems_of([str(path)])


# --- to_yaml ------------------------------------------------------------------------------------------------------

TEXTS = [
    "text", "null", "true", "1e3", "12", "~", "a: b # c", "- x", "naïve 文", "'q' \"d\"", " lead", "*.txt", "{a}", "@x", "x\ny",
]  # fmt: skip
EXTREMES: dict[str, typing.Callable[[random.Random], object]] = {
    "n_head": lambda rng: 1,
    "n_positions": lambda rng: 4096 + rng.randrange(1000),
    "sequence_length": lambda rng: 1 + rng.randrange(4096),
    "tokenizer": lambda rng: rng.choice([f"train:{rng.randint(257, 65_536)}", "some/folder", "./train: x"]),
    "skip_rows": lambda rng: rng.choice([None, "7", "1200-1263,5000"]),
    "beta1": lambda rng: rng.random(),
    "beta2": lambda rng: rng.random(),
    "muon_momentum": lambda rng: rng.random(),
    "zero_init_projections": lambda rng: False,  # which init_from excludes
    "save_at": lambda rng: rng.choice([None, "7", "229,458"]),
    "batch_ramp": lambda rng: rng.choice([None, "1x1", "64x3, 128x2", "131_072x1000"]),
    "sequence_ramp": lambda rng: rng.choice([None, "1x1", "1x3, 1x2"]),
    "max_hours": lambda rng: rng.choice([None, 0.5 + rng.random()]),
    "spike_threshold": lambda rng: 1 + rng.random(),
    "spike_window": lambda rng: 8 + rng.randrange(1000),
    "push_to_hub": lambda rng: rng.choice([None, "user/name", "1e3/0x1f", "no/null"]),
    "push_every": lambda rng: 0,
    "keep_model": lambda rng: True,  # which push_to_hub demands
    "dry_run": lambda rng: False,
    "name": lambda rng: "round",
}


def random_config(rng: random.Random) -> Config:
    """A valid configuration with nothing at its default, strings that YAML likes to read as something else included."""
    hints, values = typing.get_type_hints(Config), {}
    for name, hint in hints.items():
        arms = getattr(hint, "__args__", (hint,)) if typing.get_origin(hint) is not typing.Literal else (hint,)
        kind = rng.choice(arms)
        if name in EXTREMES:
            values[name] = EXTREMES[name](rng)
        elif typing.get_origin(kind) is typing.Literal:
            values[name] = rng.choice(typing.get_args(kind))
        elif kind is str:
            home = "~" if name in PATH_FIELDS else None  # which it reads as the path of that
            values[name] = rng.choice([t for t in TEXTS if (t != "null" or len(arms) == 1) and t != home])
        elif kind is float:
            values[name] = rng.choice([0.0, 1e-8, 6e-4, 1e22, 0.1 + 0.2, rng.random() * 10.0 ** rng.randint(-30, 30)])
        else:
            values[name] = {int: rng.choice([1, 8, 10**12]), bool: rng.random() < 0.5, type(None): None}[kind]
    values["max_steps"], values["max_tokens"] = rng.choice([(rng.randint(1, 10**6), None), (None, rng.randint(1, 10**12))])
    values["output_dir"] = values["output_dir"] or "runs/round"
    return Config(**values)


@pytest.mark.parametrize("seed", range(8))
def test_to_yaml_reads_back_to_the_same_values(write, seed):
    for n in range(10):
        config = random_config(random.Random(f"{seed} {n}"))
        assert load_config([write(to_yaml(config), "round.yaml")]) == config


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_survive_to_yaml(write, path):
    config = load_config([str(path)])
    assert load_config([write(to_yaml(config), path.name)]) == config


def test_to_yaml_has_every_field_but_dry_run():
    assert list(yaml.safe_load(to_yaml(load_config(STEPS)))) == [n for n in config_fields() if n != "dry_run"]


# --- imports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["recipe", "recipe.config", "recipe.plan", "recipe.run_folder", "recipe.cli"])
def test_imports_are_light(module):
    code = f"import sys, {module}; print(*{{'torch', 'transformers', 'datasets', 'pyarrow'}} & sys.modules.keys())"
    began = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
    assert time.perf_counter() - began < 2


def test_help_of_the_script_is_light():
    began = time.perf_counter()
    command = [sys.executable, ROOT / "scripts" / "pretrain.py", "--n_layer", "2", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert help_text("pretrain.py") in result.stdout and "accelerate launch" in result.stdout
    assert time.perf_counter() - began < 2


# --- the Hub ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, problem",
    [
        (["--push_to_hub", "name"], "push_to_hub: 'name' does not say where to; write it as USER/NAME"),
        (["--push_to_hub", "https://hub/a/b"], "push_to_hub: 'https://hub/a/b' does not say where to; write it as USER/NAME"),
        (
            ["--push_to_hub", "a/b", "--keep_model", "false"],
            "keep_model: false leaves nothing to push to push_to_hub; drop one of the two",
        ),
        (["--push_every", "500"], "push_every: there is nowhere to push to; give push_to_hub USER/NAME"),
        (["--push_to_hub", "a/b", "--push_every", "300"], "push_every: 300 is not a multiple of save_every 500"),
        (
            ["--resume", "hub:a/b"],
            "resume: 'hub:a/b' is not hub:USER/NAME@REVISION; hub:me/gpt2-124m@step-5000 is",
        ),
    ],
)
def test_where_to_push_and_resume_from(fields, problem):
    assert problems_of(["--max_steps", "1", *fields]) == [problem]


def test_an_access_token_is_refused_and_not_repeated():
    token = "hf_abcdefghijklmnopqrstuvwxyz"
    for name in ("data", "output_dir", "push_to_hub", "seed", "tokn"):
        (problem,) = problems_of(["--max_steps", "1", f"--{name}", token])
        assert problem.startswith(f"{name}: ") and token not in problem
