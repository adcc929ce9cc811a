"""Every run config with every accelerate file: parsed, planned, dry-run; and what its comments promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from launch import ROOT, TINY, launch, options
from recipe import cli, micro_batch
from recipe.config import Config, ConfigError, to_yaml
from recipe.estimate import estimate, parse_machine
from recipe.micro_batch import Card, check_alike, fit, predicted_memory, resolve
from recipe.parsing import load_config
from recipe.plan import load_run

GIB = 2**30
RUNS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
MACHINES = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))}
PARAMETERS = {"124m": 124_439_808, "350m": 354_823_168, "774m": 774_030_080, "1558m": 1_557_611_200}


def config_of(name: str, *words: str) -> Config:
    return load_config([str(ROOT / "configs" / f"{name}.yaml"), *words])


def test_the_sizes_are_all_here() -> None:
    assert set(RUNS) == {"quickstart", "gpt2-124m-24gb"} | {
        f"gpt2-{size}{kind}" for size in PARAMETERS for kind in ("", "-fast")
    }


# --- run configs x accelerate files -------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES)
def test_accelerate_reads_the_file(machine: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "configs" / "accelerate" / f"{machine}.yaml"
    read = load_config_from_file(str(path))
    assert read.num_processes == MACHINES[machine]["num_processes"]
    assert str(read.distributed_type).removeprefix("DistributedType.") == MACHINES[machine]["distributed_type"]
    assert read.num_processes % read.num_machines == 0
    if "zero1" in machine or machine == "1gpu":
        assert read.deepspeed_config["zero_stage"] == 1
    # Precision is the run's, and so is accumulation.
    assert read.mixed_precision == "no" and "gradient_accumulation_steps" not in path.read_text()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("run", RUNS)
def test_every_run_is_planned_and_dry_run_on_every_machine(
    run: str, machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ranks = MACHINES[machine]["num_processes"]
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    gpus = "cpu" not in machine
    if gpus:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str("zero_stage" in str(MACHINES[machine])).lower())
        memory = 24 if run.endswith("24gb") else 80
        monkeypatch.setattr(micro_batch, "find_card", lambda: Card(memory * GIB))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    words = [str(ROOT / "configs" / f"{run}.yaml"), "--data", "text", "--tokenizer", "train:50257", "--dry_run"]
    if run == "gpt2-124m-24gb" and ranks > 8:
        with pytest.raises(ConfigError, match="or micro_batch_size 16 or 8 ranks works|micro_batch_size 32"):
            load_run(words, 32)
        return
    assert cli.main(words) == 2  # for the text is one word, which is said behind the rest
    shown = capsys.readouterr()
    problems = [line for line in shown.err.splitlines()[1:] if "disk has" not in line]  # that is this machine's
    assert len(problems) == 1 and "gives 0 tokens for validation" in problems[0]
    lines = {" ".join(line.split()) for line in shown.out.splitlines()}
    if size := re.search(r"\d+m", run):
        assert f"parameters {PARAMETERS[size[0]]:,} (assuming GPT-2's vocabulary of 50,257)" in lines
    assert f"ranks {ranks}" in lines and "base: gpt2-124m.yaml" not in lines
    config, plan = load_run(words, ranks)
    assert plan.accumulation * config.micro_batch_size * config.sequence_length * ranks == config.batch_tokens
    assert f"micro_batch_size: {config.micro_batch_size}" in lines
    assert config.activation_checkpointing is False  # the cards of 80 GB hold every size without it
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("machine", [name for name, file in MACHINES.items() if file["num_machines"] == 1])
def test_the_launcher_takes_the_file(machine: str, tmp_path: Path, fineweb_folder: Path) -> None:
    fields = {"data": fineweb_folder, "tokenizer": "train:400", "sequence_length": 64, "batch_tokens": 8192, "max_steps": 2}
    fields |= {"warmup_steps": 1, "output_dir": tmp_path / "run", "validation_tokens": 2048}
    output = launch(machine, str(ROOT / "configs" / "gpt2-124m.yaml"), *options(**fields), "--dry_run").stdout
    assert output.count("tokens in all     16,384") == 1
    assert f"ranks             {MACHINES[machine]['num_processes']}" in output


# --- what the comments say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [name for name in RUNS if name != "quickstart"])
def test_the_comment_gives_what_the_plan_gives(run: str) -> None:
    text = " ".join((ROOT / "configs" / f"{run}.yaml").read_text().replace("\n#", " ").split())
    found = re.search(r"by scripts/plan\.py for (\S+) at ([\d.]+) dollars an hour: ([\d.]+) hours, ([\d,]+) dollars", text)
    assert found and "redicted" in text, "each config says what it costs and whether that was measured"
    machine, price, hours, dollars = found.groups()
    known = estimate(config_of(run), parse_machine(machine), float(price))
    assert known.fits
    assert float(hours) == pytest.approx(known.hours, rel=0.05)
    assert float(dollars.replace(",", "")) == pytest.approx(known.dollars, rel=0.05)
    billions = re.search(r"([\d.]+)B tokens", text)
    assert float(billions[1]) == pytest.approx(known.tokens / 1e9, rel=0.01)
    assert re.search(r"loss \d\.\d|no loss", text)


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_fast_twin_follows_the_rule(size: str) -> None:
    classic, fast = config_of(f"gpt2-{size}"), config_of(f"gpt2-{size}-fast")
    tokens = lambda config: config.max_tokens or config.max_steps * config.batch_tokens  # noqa: E731
    assert tokens(fast) / tokens(classic) == pytest.approx(0.45, rel=0.02)
    assert fast.learning_rate == pytest.approx(5e-3 * (768 / fast.n_embd) ** 0.5, rel=0.005)
    assert (fast.optimizer, fast.muon_learning_rate) == ("muon", 0.02)
    for name in ("data", "n_layer", "n_head", "n_embd", "batch_tokens", "sequence_length", "validation_tokens"):
        assert getattr(classic, name) == getattr(fast, name)


# --- base ---------------------------------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_builds_on_another(tmp_path: Path) -> None:
    (tmp_path / "sizes").mkdir()
    write(tmp_path, a="n_layer: 3\nmax_tokens: 1000\nseed: 1\n", b="base: a.yaml\nseed: 2\nn_embd: 96\n")
    write(tmp_path / "sizes", c="base: ../b.yaml\nmax_steps: 7\nn_embd: 48\n")
    config = load_config([str(tmp_path / "sizes" / "c.yaml"), "--n_layer", "5"])
    assert (config.n_layer, config.n_embd, config.seed) == (5, 48, 2)
    # The nearest length of the run replaces the others.
    assert (config.max_steps, config.max_tokens, config.name) == (7, None, "c")
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert "base" not in to_yaml(config)
    again = load_config([str(tmp_path / "again.yaml")])
    assert {**vars(again), "name": "", "output_dir": ""} == {**vars(config), "name": "", "output_dir": ""}
    assert load_config([str(tmp_path / "sizes" / "c.yaml"), "--max_tokens", "9"]).max_steps is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: a.yaml\n"}, r"base: \S+a.yaml -> \S+a.yaml is a circle"),
        ({"a": "base: b.yaml\n", "b": "base: a.yaml\n"}, r"base: \S+a.yaml -> \S+b.yaml -> \S+a.yaml is a circle"),
        ({"a": "base: gone.yaml\n"}, r"\S+gone.yaml: no such config file"),
        ({"a": "base: 3\n"}, r"base: 3 \(\S+a.yaml\) is not the path of a YAML file"),
        ({"a": "base: b.yaml\n", "b": "n_layr: 2\n"}, r"n_layr: unknown field \(\S+b.yaml\); did you mean n_layer"),
        ({"a": "base: b.yaml\n", "b": "n_layer: two\n"}, r"n_layer: 'two' \(\S+b.yaml\) is not a whole number"),
        ({"a": "base: b.yaml\n", "b": "max_steps: 1\nmax_tokens: 9\n"}, r"max_steps and max_tokens: \S+b.yaml gives both"),
        ({"a": "base: b.yaml\n", "b": "- list\n"}, r"\S+b.yaml: expected `field: value` lines"),
    ],
)
def test_a_bad_base_is_one_clear_problem(tmp_path: Path, files: dict[str, str], message: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(ConfigError) as error:
        load_config([str(tmp_path / "a.yaml"), "--warmup_steps", "0", "--max_steps", "5"])
    assert len(error.value.problems) == 1 and re.match(message, error.value.problems[0]), error.value.problems


def test_base_is_no_field() -> None:
    with pytest.raises(ConfigError, match="base: unknown field"):
        load_config(["--base", "a.yaml", "--max_steps", "1"])


# --- micro batch and activation checkpointing ---------------------------------------------------------------------


def test_what_a_card_holds_decides() -> None:
    large = config_of("gpt2-1558m")
    # 1558M on one 80 GB card and on eight: without computing anything twice.
    assert (one := fit(large, 1, 80 * GIB)).micro_batch_size == 16 and not one.activation_checkpointing
    assert (eight := fit(large, 8, 80 * GIB)).micro_batch_size == 16 and not eight.activation_checkpointing
    assert eight.memory < one.memory <= 0.93 * 80 * GIB
    # On one of 40 GB a row or two would fit; computing twice makes it sixteen.
    small = fit(large, 1, 40 * GIB)
    assert small.activation_checkpointing and small.micro_batch_size >= 8 and small.memory <= 0.93 * 40 * GIB
    assert fit(config_of("gpt2-1558m", "--activation_checkpointing", "false"), 1, 40 * GIB).micro_batch_size <= 2
    assert fit(large, 1, 24 * GIB) is None
    assert fit(large, 8, 24 * GIB).activation_checkpointing
    # Without ZeRO-1 every rank has all masters and moments.
    assert fit(large, 8, 40 * GIB, zero1=False).memory > fit(large, 8, 40 * GIB).memory - 10 * GIB
    assert fit(config_of("gpt2-124m"), 8, 80 * GIB).micro_batch_size == 64
    # What was asked for is kept.
    asked = fit(config_of("gpt2-124m", "--micro_batch_size", "3", "--activation_checkpointing", "true"), 1, 80 * GIB)
    assert (asked.micro_batch_size, asked.activation_checkpointing) == (3, True)


@pytest.mark.parametrize(
    ("words", "ranks", "card", "rows", "twice"),
    [
        ([], 1, None, 8, False),
        (["--batch_tokens", "3072"], 1, None, 1, False),
        (["--batch_tokens", "12288"], 2, None, 2, False),
        (["--batch_tokens", "524288", "--batch_ramp", "8192x10"], 2, Card(80 * GIB), 4, False),
        ([], 8, Card(80 * GIB), 64, False),
        ([], 16, Card(80 * GIB), 32, False),
        (["--micro_batch_size", "2"], 8, Card(80 * GIB), 2, False),
        ([], 1, Card(16 * GIB), 32, False),
        ([], 1, Card(16 * GIB, bf16=False), 16, False),
        (["--tokenizer", "other/tokenizer"], 1, Card(24 * GIB), 16, False),
        (["--kernels", "plain"], 1, Card(24 * GIB), 16, False),
        (["--micro_batch_size", "64"], 1, Card(24 * GIB), 64, True),
    ],
)
def test_the_micro_batch_is_settled(words: list[str], ranks: int, card: Card | None, rows: int, twice: bool) -> None:
    settled = resolve(config_of("gpt2-124m", *words), ranks, card)
    assert (settled.micro_batch_size, settled.activation_checkpointing) == (rows, twice)
    assert settled.precision == "auto"


def test_a_model_that_fits_no_card_is_refused_with_what_would_help() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch_size: one row takes \d+\.\d GiB .* 22\.3 to use; take a larger card"):
        resolve(config_of("gpt2-1558m"), 1, Card(24 * GIB))


def test_cards_of_different_memory_are_refused_with_what_fits_all() -> None:
    check_alike([(8, False), (8, False)])
    with pytest.raises(ConfigError, match="give --micro_batch_size 4 --activation_checkpointing true, which fits"):
        check_alike([(8, False), (4, True), (8, False)])


def test_the_prediction_is_the_estimate_s(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("gpt2-1558m", "--micro_batch_size", "16")
    known = estimate(config, parse_machine("8xH100-80GB"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert predicted_memory(config, 8, 50_257) == pytest.approx(known.memory_total / GIB)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    # Without ZeRO-1 each rank keeps the masters and moments that eight would share.
    assert predicted_memory(config, 8, 50_257) - known.memory_total / GIB == pytest.approx(
        12 * 1.5577e9 * 7 / 8 / GIB, rel=1e-3
    )


@pytest.mark.slow
def test_what_was_settled_is_printed_and_recorded(tmp_path: Path, fineweb_folder: Path) -> None:
    fields = TINY | {"data": fineweb_folder, "output_dir": tmp_path / "run", "max_steps": 2, "warmup_steps": 1}
    del fields["micro_batch_size"]
    output = launch("cpu", *options(**fields)).stdout
    # 16 rows a step, and on a CPU eight at a time.
    assert "(8 rows x 64 tokens x 1 ranks x 2 accumulation)" in output
    for name in ("config.yaml", "environment.json"):
        known = yaml.safe_load((tmp_path / "run" / name).read_text())
        assert (known["micro_batch_size"], known["activation_checkpointing"]) == (8, False)
    # The run may go on with other rows at a time, and with activations computed twice.
    again = options(**fields | {"micro_batch_size": 2, "activation_checkpointing": "true"})
    assert "finished" in launch("cpu", *again).stdout
