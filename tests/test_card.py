"""The model card: every number is one of the run's files, and what they do not have is left out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries

from recipe.config import FINEWEB
from recipe.monitor.run_record import GPT2_VOCAB_SHA256
from recipe.publish.card import write_card
from recipe.publish.contents import export_files
from recipe.run_folder import RunFolder

RESULT = {"n": 10042, "acc": 0.29, "acc_stderr": 0.00453, "acc_norm": 0.305, "acc_norm_stderr": 0.0046}
ON_HUB = {"name": "Rowan/hellaswag", "revision": "a" * 40}
A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"


@pytest.fixture
def folder(trained_run: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(trained_run, tmp_path / "gpt2-tiny"))


def set_config(folder: RunFolder, **values: object) -> None:
    folder.config.write_text(yaml.safe_dump(yaml.safe_load(folder.config.read_text()) | values))


def set_environment(folder: RunFolder, **values: object) -> None:
    path = folder.path / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def set_starts(folder: RunFolder, *starts: tuple[int, int, str]) -> None:
    """Step, ranks and device of each."""
    lines = [{"step": s, "ranks": r, "device": d, "lost_steps": 0, "lost_seconds": 0.0} for s, r, d in starts]
    (folder.path / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def set_records(folder: RunFolder, after: int = 0, step_seconds: float = 360.0) -> None:
    """Let the records begin behind a step, each step having taken so long: all 20 take two hours."""
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    lines = [line | {"step_seconds": step_seconds} if "train_loss" in line else line for line in lines if line["step"] > after]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def add_result(
    folder: RunFolder, task: str = "hellaswag", step: int = 20, limit: int | None = None, name: str = "", **numbers: object
) -> None:
    record = {"tasks": {task: RESULT | {"data": ON_HUB} | numbers}, "step": step, "limit": limit}
    (folder.evaluation / f"{name or task}.json").write_text(json.dumps(record))


def card(folder: RunFolder) -> ModelCard:
    return ModelCard.load(write_card(folder), ignore_metadata_errors=False)


def eval_results(folder: RunFolder) -> list:
    paths = [path for name, path in export_files(folder.export).items() if name.startswith(".eval_results/")]
    return [entry for path in paths for entry in parse_eval_result_entries(yaml.safe_load(path.read_text()))]


def test_a_small_run_says_what_it_knows_and_nothing_else(folder):
    found = card(folder)
    training = [json.loads(line) for line in folder.metrics.read_text().splitlines() if "val_loss" in line]
    text = found.text
    assert f"Validation loss {training[-1]['val_loss']:.4f} nats per token" in text
    assert "20,480 tokens in 20 steps of 1,024 tokens" in text
    assert "![Training and validation loss](loss.png)" in text and (folder.export / "loss.png").stat().st_size > 10_000
    for absent in ("dollars", "kWh", "Energy", "None", "nan", "hellaswag", "FineWeb", "null", "not measured"):
        assert absent not in text, absent
    assert found.data.library_name == "transformers" and found.data.pipeline_tag == "text-generation"
    assert found.data.tags == ["gpt2", "pretrained-from-scratch"]
    assert found.data.datasets is None and found.data.eval_results is None and not eval_results(folder)


def test_fineweb_and_its_licence_are_named(folder):
    set_config(folder, data=FINEWEB)
    set_environment(folder, text=FINEWEB)
    found = card(folder)
    assert found.data.datasets == ["HuggingFaceFW/fineweb"] and found.data.language == "en"
    for part in (
        "by Hugging Face",
        "Open Data Commons Attribution License (ODC-By) 1.0",
        "Common Crawl",
        FINEWEB,
        "2406.17557",
    ):
        assert part in found.text


def test_hours_dollars_and_energy_are_computed_from_the_steps(folder):
    set_records(folder)
    set_config(folder, price_per_hour=14.0)
    hardware = {"gpu": A100, "cores": 96}
    set_environment(folder, ranks=8, hardware=hardware)
    set_starts(folder, (0, 8, A100))
    text = card(folder).text
    assert f"2h00m of training steps on 8 × {A100}" in text
    assert "28.00 dollars for the training steps, at 14 dollars an hour" in text
    assert "6.40 kWh, the GPUs at their limit of 400 W" in text and "an estimate" in text
    assert "--num_processes 8" in text
    (folder.path / "starts.jsonl").unlink()  # of an old run
    assert card(folder).text == text


def test_a_branch_counts_its_own_part_alone(folder):
    """It began at step 15 of another run: 5 of its 20 steps, half an hour, were done here."""
    set_records(folder, after=15)
    set_config(folder, price_per_hour=14.0)
    set_starts(folder, (15, 8, A100))
    text = card(folder).text
    assert (
        "20,480 tokens in 20 steps of 1,024 tokens, branched off another run at step 15; time, money and energy are those of "
        f"its own 5,120 tokens in 5 steps: 30m00s of training steps on 8 × {A100}." in text
    )
    assert "7.00 dollars" in text and "1.60 kWh" in text


@pytest.mark.parametrize(
    "starts, machines",
    [
        ([(0, 8, A100), (18, 1, H100)], f"8 × {A100}, then 1 × {H100}"),
        ([(0, 8, A100), (9, 4, A100), (18, 8, A100)], f"8 × {A100}, then 4 × {A100}"),
        ([(10, 1, H100)], f"another machine, then 1 × {H100}"),  # from the Hub, with the records of the first ten steps
        ([(0, 8, A100), (20, 1, H100)], f"8 × {A100}"),  # the last start did but export
        ([(0, 2, H100), (0, 8, A100)], f"8 × {A100}"),  # the first did not get to a step
    ],
)
def test_a_run_that_moved_names_its_machines_and_leaves_out_what_it_cannot_know(folder, starts, machines):
    set_records(folder)
    set_config(folder, price_per_hour=14.0)
    set_environment(folder, ranks=starts[-1][1], hardware={"gpu": starts[-1][2], "cores": 8})
    set_starts(folder, *starts)
    text = card(folder).text
    assert f"2h00m of training steps on {machines}.\n" in text
    known = "then" not in machines
    assert ("28.00 dollars" in text) == ("6.40 kWh" in text) == ("dollars" in text) == ("kWh" in text) == known


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA A100 80GB PCIe", "NVIDIA L40S", "NVIDIA L4", "Some Card"])
def test_the_power_limit_is_the_cards_own(folder, gpu):
    set_starts(folder, (0, 1, gpu))
    watts = re.search(r"at their limit of (\d+) W", card(folder).text)
    expected = {"H100": "700", "A100": "300", "L40S": "350", "L4": "72", "Card": None}[gpu.split()[1]]
    assert (watts and watts[1]) == expected


def test_results_stand_beside_references_of_their_style(folder):
    add_result(folder)
    with open(folder.metrics, "a") as handle:
        handle.write(json.dumps({"step": 20, "hellaswag_completion_acc_norm": 0.3, "hellaswag_completion_n": 10042}) + "\n")
    found = card(folder)
    harness, completion = (part for part in re.split(r"\n\n(?=\| model)", found.text) if part.startswith("| model"))
    assert "| this model | hellaswag | 10,042 | acc_norm | 0.3050 ± 0.0046 |" in harness
    assert "0.3114 ± 0.0046" in harness and "0.2955" not in harness
    assert "| this model | 0.3000 ± 0.0046 |" in completion
    assert "0.2955 ± 0.0046" in completion and "0.3054" in completion and "0.3114" not in completion
    (entry,) = eval_results(folder)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("Rowan/hellaswag", "hellaswag", 0.305)
    assert entry.dataset_revision == "a" * 40 and "standard error 0.0046" in entry.notes
    (result,) = found.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("Rowan/hellaswag", "acc_norm", 0.305)


@pytest.mark.parametrize(
    "change",
    [
        {"n": 64, "data": {"name": "hellaswag_mini.jsonl", "sha256": "b" * 64}},
        {"n": 5000, "data": {"name": "hellaswag.jsonl", "sha256": "b" * 64}},
        {"n": 100, "limit": 100},
    ],
)
def test_a_part_of_the_items_is_no_benchmark(folder, change):
    add_result(folder, **change)
    found = card(folder)
    assert f"{change['n']:,} | acc_norm | 0.3050" in found.text
    assert "0.3114" not in found.text, "a reference of other items"
    assert not eval_results(folder) and found.data.eval_results is None
    assert ("are no benchmark" in found.text) == (change["n"] == 64)


def test_a_small_evaluation_stands_beside_the_whole_one(folder):
    add_result(folder)
    mini = {"name": "hellaswag_mini.jsonl", "sha256": "b" * 64}
    add_result(folder, name="hellaswag-mini", n=64, acc=0.5, acc_norm=0.5, data=mini)
    with open(folder.metrics, "a") as handle:
        for n, kind, score in ((10042, "whole", 0.3), (64, "mini", 0.5)):
            line = {"step": 20, "hellaswag_completion_acc_norm": score, "hellaswag_n": n, "hellaswag_kind": kind}
            handle.write(json.dumps(line) + "\n")
    text = card(folder).text
    assert "| this model | hellaswag | 10,042 | acc_norm | 0.3050 ± 0.0046 |" in text and "0.3114" in text
    assert "| this model | hellaswag (hellaswag_mini.jsonl) | 64 | acc_norm | 0.5000 ± 0.0046 |" in text
    assert "| this model | 0.3000 ± 0.0046 |" in text and "| this model | 0.5" not in text
    assert len(eval_results(folder)) == 1


def test_a_local_copy_of_all_items_compares_and_is_not_published(folder):
    add_result(folder, data={"name": "hellaswag.jsonl", "sha256": "b" * 64})
    text = card(folder).text
    assert "hellaswag (hellaswag.jsonl) | 10,042" in text and "0.3114" in text and not eval_results(folder)


def test_an_item_alone_has_no_standard_error(folder):
    numbers = {"n": 1, "acc": 1.0, "acc_norm": 0.0, "data": ON_HUB | {"kind": "part"}}
    (folder.evaluation / "hellaswag.json").write_text(json.dumps({"tasks": {"hellaswag": numbers}, "step": 20, "limit": 1}))
    text = card(folder).text
    assert "| this model | hellaswag (a part) | 1 | acc | 1.0000 |" in text and not eval_results(folder)


@pytest.mark.parametrize(
    "change, drawn",
    [
        ({"vocab_sha256": GPT2_VOCAB_SHA256}, True),
        ({"vocab_sha256": "0" * 64}, False),  # the default's name in config.yaml, but tokens prepared with another one
        ({"vocab_sha256": None}, True),  # an old run
        ({"vocab_sha256": GPT2_VOCAB_SHA256, "text": "installed-docs"}, False),
        ({"vocab_sha256": GPT2_VOCAB_SHA256, "text": "HuggingFaceFW/fineweb-edu:sample-10BT"}, False),
        ({"vocab_sha256": GPT2_VOCAB_SHA256, "text": "HuggingFaceFW/fineweb@refs/pr/1"}, True),
    ],
)
def test_llmcs_curve_is_drawn_beside_losses_of_its_text_and_tokens(folder, monkeypatch, change, drawn):
    seen = []
    monkeypatch.setattr("recipe.publish.card.write_loss_curve", lambda records, is_fineweb, path: seen.append(is_fineweb))
    set_config(folder, data=FINEWEB, tokenizer="openai-community/gpt2")
    set_environment(folder, **{"text": FINEWEB} | change)
    write_card(folder)
    assert seen == [drawn]


def test_results_of_another_step_are_not_this_models(folder):
    add_result(folder, step=10)
    assert "hellaswag" not in card(folder).text


def test_a_card_of_an_earlier_checkpoint_knows_nothing_of_later_steps(folder):
    (folder.export / "run.json").write_text(json.dumps({"step": 10}))
    text = card(folder).text
    assert "10,240 tokens in 10 steps" in text and "at step 10" in text and "step 20" not in text


def test_samples_cannot_become_markup(folder):
    nasty = "```\n# Heading\n---\n<script>alert(1)</script> ````"
    record = {"step": 20, "samples": [{"prompt": "The", "continuation": nasty}]}
    (folder.evaluation / "samples-step-00000020.json").write_text(json.dumps(record))
    text = card(folder).text
    assert f"`````text\nThe{nasty}\n`````" in text


def test_what_looks_like_a_token_or_an_address_with_a_password_is_blotted_out(folder):
    command = ["python", "scripts/pretrain.py", "--data", "hf_abcdefghijklmnopqrst", "https://me:secret@host/x?sig=abc"]
    set_environment(folder, command=command)
    text = card(folder).text
    assert "hf_***" in text and "https://host/x" in text
    for secret in ("abcdefghijklmnopqrst", "secret", "sig=abc"):
        assert secret not in text


def test_what_was_trained_on_from_other_weights_is_not_from_scratch(folder):
    set_config(folder, init_from="openai-community/gpt2")
    found = card(folder)
    assert "trained on from `openai-community/gpt2`" in found.text and "from scratch" not in found.text
    assert found.data.tags == ["gpt2"]


def test_a_commit_with_changes_is_said_to_have_them(folder):
    set_environment(folder, commit="c" * 40 + "-dirty")
    assert f"at commit `{'c' * 40}`, which had changes that were not committed" in card(folder).text
    set_environment(folder, commit=None)
    text = card(folder).text
    assert "commit" not in text.partition("## Results")[0].partition("## Training")[2]
