"""evaluate.py, compare.py and generate.py as a user starts them, on models with random weights."""

from __future__ import annotations

import json
import math
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from launch import ROOT, accelerate_command, environment
from recipe.config import ConfigError
from recipe.evaluation.comparison import compare_items, describe, mcnemar
from recipe.evaluation.items import MINI, read_items
from recipe.generation import Writer
from recipe.tokenizer import train_tokenizer


def make_model(folder: Path, seed: int) -> Path:
    items = read_items("mini")
    tokenizer = train_tokenizer([f"{item['ctx']} {ending}" for item in items for ending in item["endings"]], 600)
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 256, "initializer_range": 0.3}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "a", 0), make_model(folder / "b", 1)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """A folder with a local copy in two files."""
    folder = tmp_path_factory.mktemp("items")
    items = read_items("mini")
    for n, part in enumerate((items[:30], items[30:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{n}.parquet")
    return folder


@pytest.fixture(scope="module")
def results(models, parquet: Path, tmp_path_factory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("results") / "a.json"
    tasks = "hellaswag,hellaswag_completion"
    done = run("evaluate.py", models[0], "--tasks", tasks, "--data_dir", parquet, "--output", output)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), output


def test_the_results_say_what_was_measured(results, models, parquet: Path) -> None:
    found, _ = results
    task = found["tasks"]["hellaswag"]
    assert task["n"] == 64 and task["version"] == 1.0 and len(task["hash"]) == 64
    assert task["data"]["name"] == parquet.name and len(task["data"]["sha256"]) == 64
    assert (found["dtype"], found["truncated"], len(found["model_sha256"])) == ("float32", 0, 64)
    for name, items in found["items"].items():
        assert len(items) == 64 and all(len(item["log_likelihoods"]) == 4 for item in items)
        for metric in ("acc", "acc_norm"):
            assert found["tasks"][name][metric] == pytest.approx(sum(i[metric] for i in items) / 64)
            spread = math.sqrt(found["tasks"][name][metric] * (1 - found["tasks"][name][metric]) / 63)
            assert found["tasks"][name][f"{metric}_stderr"] == pytest.approx(spread)


def test_the_command_it_prints_gives_the_same_numbers_from_a_local_copy(results, tmp_path: Path) -> None:
    found, _ = results
    command = shlex.split(found["command"])
    assert command[0] == "lm_eval" and "--include_path" in command
    command[0] = str(Path(sys.executable).parent / "lm_eval")
    subprocess.run([*command, "--output_path", str(tmp_path)], env=environment(), check=True, capture_output=True, timeout=200)
    (output,) = tmp_path.rglob("results_*.json")
    theirs = json.loads(output.read_text())["results"]["hellaswag"]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert theirs[f"{metric},none"] == pytest.approx(found["tasks"]["hellaswag"][metric], abs=1e-12)


@pytest.mark.slow
def test_two_processes_give_the_same_to_the_item(results, models, parquet: Path, tmp_path: Path) -> None:
    found, _ = results
    output = tmp_path / "two.json"
    arguments = (str(models[0]), "--tasks", ",".join(found["tasks"]), "--data_dir", str(parquet), "--output", str(output))
    command = accelerate_command("2cpu-ddp", *arguments, script=str(ROOT / "scripts" / "evaluate.py"))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads(output.read_text())
    assert two["ranks"] == 2 and done.stdout.count("hellaswag (64 items)") == 1
    for task, items in found["items"].items():
        for one, other in zip(items, two["items"][task], strict=True):
            assert other["log_likelihoods"] == pytest.approx(one["log_likelihoods"], abs=1e-4)
            assert {k: other[k] for k in ("doc_id", "acc", "acc_norm")} == {k: one[k] for k in ("doc_id", "acc", "acc_norm")}


# --- comparison -----------------------------------------------------------------------------------------------------------


def test_comparison_by_hand() -> None:
    right = {"a": [1, 1, 1, 1, 1, 0, 0, 1], "b": [1, 0, 0, 0, 1, 0, 1, 1]}
    a, b = ([{"doc_id": n, "target": 0, "acc": float(v)} for n, v in enumerate(right[name])] for name in "ab")
    (found,) = compare_items(a, b)
    assert (found.n, found.a, found.b, found.only_a, found.only_b) == (8, 6 / 8, 4 / 8, 3, 1)
    assert found.difference == pytest.approx(0.25)
    # Differences 0 1 1 1 0 0 -1 0: sum of squares 4, mean 1/4.
    assert found.standard_error == pytest.approx(math.sqrt((4 - 8 / 16) / 7 / 8))
    assert found.p_value == pytest.approx(2 * (1 + 4) / 2**4)


def test_mcnemar() -> None:
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(10, 0) == mcnemar(0, 10) == pytest.approx(2 / 2**10)
    assert mcnemar(700, 500) < 1e-7


def test_other_items_are_not_compared() -> None:
    items = [{"doc_id": 0, "doc_hash": "x", "target": 0, "acc": 1.0}]
    with pytest.raises(ConfigError, match="different items"):
        compare_items(items, [items[0] | {"doc_hash": "y"}])
    with pytest.raises(ConfigError, match="1 items and B 2"):
        compare_items(items, items * 2)


def test_compare_takes_models_and_results(results, models, parquet: Path, tmp_path: Path) -> None:
    found, path = results
    output = tmp_path / "comparison.json"
    done = run("compare.py", path, models[1], "--tasks", "hellaswag", "--data_dir", parquet, "--output", output)
    assert done.returncode == 0, done.stderr
    acc, acc_norm = json.loads(output.read_text())["hellaswag"]
    assert (acc["metric"], acc_norm["metric"], acc["n"]) == ("acc", "acc_norm", 64)
    assert acc["a"] == found["tasks"]["hellaswag"]["acc"]
    assert acc["difference"] == pytest.approx((acc["only_a"] - acc["only_b"]) / 64)
    assert f"only A right: {acc['only_a']}, only B right: {acc['only_b']}" in done.stdout
    items = found["items"]["hellaswag"]
    lines = [line for comparison in compare_items(items, items) for line in describe("hellaswag", comparison)]
    assert "difference +0.0000 ± 0.0000" in lines[0] and "p = 1" in lines[1]
    wrong = run("compare.py", path, MINI.with_name("none.json"))
    assert wrong.returncode == 2 and "none.json cannot be read" in wrong.stderr


# --- generation -----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_continued_and_a_seed_repeats_it(models, capsys) -> None:
    texts = []
    for seed in (1, 1, 2):
        texts.append(Writer(str(models[0]), max_new_tokens=12, seed=seed).write("A man"))
        assert capsys.readouterr().out == texts[-1] + "\n"
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("A man") and len(text) > len("A man") for text in texts)
    with pytest.raises(ConfigError, match="temperature"):
        Writer(str(models[0]), temperature=-1)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Writer(str(models[0] / "nothing"))


def test_a_session_in_a_terminal(models) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), str(models[0]), "--max_new_tokens", "8"]
    process = subprocess.Popen(command, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = ""
    for typed in ("A man is\n", "dog " * 900 + "\n", "The dog\n", "\n"):  # one that leaves no room is told, and no end
        while not seen.endswith("> "):
            seen += os.read(ours, 1000).decode()
        os.write(ours, typed.encode())
        seen += typed
    assert process.wait(timeout=60) == 0
    os.close(ours)
    assert seen.count("A man is") >= 2 and seen.count("The dog") >= 2 and "Traceback" not in seen
