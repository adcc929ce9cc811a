"""What is written down of an evaluation: of which items it is, and that a lesser one never takes the place of a better one."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launch import metrics
from recipe.config import Config
from recipe.distributed import Distributed
from recipe.evaluation.in_loop import InLoopHellaSwag
from recipe.evaluation.items import MINI, read_items
from recipe.evaluation.records import data_kind, metrics_of, read_results, scores_kind
from recipe.evaluation.references import HELLASWAG_ITEMS
from recipe.evaluation.results import record_results
from recipe.evaluation.suite import evaluate
from recipe.model import build_model
from recipe.parsing import load_config
from recipe.publish import finish
from recipe.run_folder import RunFolder
from recipe.tokenizer import train_tokenizer

SCORES = {"acc": 0.25, "acc_stderr": 0.05, "acc_norm": 0.3, "acc_norm_stderr": 0.05}


@pytest.fixture
def folder(trained_run: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(trained_run, tmp_path / "gpt2-tiny"))


@pytest.mark.parametrize(
    "data, n, limit, kind",
    [
        (None, HELLASWAG_ITEMS, None, "whole"),
        (None, HELLASWAG_ITEMS, 20_000, "whole"),
        (None, 2376, None, "whole"),  # of another task
        (None, 100, 100, "part"),
        ("copy.jsonl", HELLASWAG_ITEMS, None, "copy"),
        ("copy.jsonl", 100, 100, "part"),
        ("items.parquet", 5000, None, "part"),
        ("mini", 64, None, "mini"),
        ("mini", 3, 3, "mini"),
        (str(MINI), 64, None, "mini"),
    ],
)
def test_the_kind_of_what_was_evaluated(data: str | None, n: int, limit: int | None, kind: str) -> None:
    assert data_kind(data, n, limit) == kind


@pytest.mark.parametrize(
    "record, data, kind",
    [
        ({"hellaswag_n": 64, "hellaswag_kind": "mini"}, None, "mini"),
        ({"hellaswag_n": HELLASWAG_ITEMS, "hellaswag_kind": "whole"}, "mini", "whole"),
        # Of older runs, whose configuration is all that tells.
        ({"hellaswag_n": 64}, "mini", "mini"),
        ({"hellaswag_n": HELLASWAG_ITEMS}, None, "whole"),
        ({"hellaswag_completion_n": HELLASWAG_ITEMS}, "copy.jsonl", "copy"),
        ({"hellaswag_n": 1000}, None, "part"),
        ({}, None, "whole"),
    ],
)
def test_the_kind_of_a_line_of_metrics(record: dict, data: str | None, kind: str) -> None:
    assert scores_kind(record, data) == kind


@pytest.mark.parametrize(
    "numbers, limit, kind",
    [
        ({"data": {"name": "Rowan/hellaswag", "revision": None}, "n": HELLASWAG_ITEMS}, None, "whole"),
        ({"data": {"name": "Rowan/hellaswag", "revision": None}, "n": 100}, 100, "part"),
        ({"data": {"name": MINI.name, "sha256": "0"}, "n": 64}, None, "mini"),
        ({"n": HELLASWAG_ITEMS}, None, "copy"),
        ({"data": {"name": "x", "sha256": "0", "kind": "mini"}, "n": 64}, None, "mini"),
    ],
)
def test_the_kind_of_results_that_do_not_say_it(tmp_path: Path, numbers: dict, limit: int | None, kind: str) -> None:
    (tmp_path / "hellaswag.json").write_text(json.dumps({"tasks": {"hellaswag": numbers}, "limit": limit}))
    (tmp_path / "arc.json").write_text('{"tasks": {"arc')
    (found,) = read_results(tmp_path)
    assert found["tasks"]["hellaswag"]["data"]["kind"] == kind


def results(kind: str, n: int = 64) -> dict:
    numbers = {"n": n, **SCORES, "data": {"name": "x", "kind": kind}}
    return {"tasks": {"hellaswag": numbers}, "items": {}, "truncated": 0, "command": None, "limit": None}


def kinds(folder: RunFolder) -> dict[str, str]:
    paths = sorted(folder.evaluation.glob("hellaswag*.json"))
    return {p.stem: json.loads(p.read_text())["tasks"]["hellaswag"]["data"]["kind"] for p in paths}


def test_a_lesser_evaluation_goes_to_a_file_of_its_own(folder: RunFolder) -> None:
    record_results(folder, results("mini"), 20, lambda line: None)
    assert kinds(folder) == {"hellaswag": "mini"}
    record_results(folder, results("whole"), 20, lambda line: None)
    assert kinds(folder) == {"hellaswag": "whole"}
    for kind in ("part", "mini", "copy"):
        record_results(folder, results(kind), 20, lambda line: None)
    lesser = {f"hellaswag-{kind}": kind for kind in ("copy", "mini", "part")}
    assert kinds(folder) == {"hellaswag": "whole"} | lesser
    record_results(folder, results("whole", n=65), 20, lambda line: None)
    assert json.loads((folder.evaluation / "hellaswag.json").read_text())["tasks"]["hellaswag"]["n"] == 65
    lines = [line for line in metrics(folder.path) if "hellaswag_acc" in line]
    assert [line["hellaswag_kind"] for line in lines] == ["mini", "whole", "part", "copy", "whole"]  # none twice


def test_a_standard_error_that_is_not_there_is_not_told() -> None:
    numbers = {"n": 1, "version": 1.0, "acc": 1.0, "acc_norm": 0.5, "acc_norm_stderr": 0.1, "hash": "x"}
    assert list(metrics_of(numbers)) == [("acc", "1.0000"), ("acc_norm", "0.5000 ± 0.1000")]
    assert list(metrics_of({"acc": 1.0, "acc_stderr": math.nan})) == [("acc", "1.0000")]  # of older results


def test_the_loop_notes_of_which_items_its_numbers_are() -> None:
    items = read_items("mini")[:4]
    tokenizer = train_tokenizer([item["ctx"] for item in items], 300)
    config = Config(n_layer=1, n_head=1, n_embd=16, n_positions=256, sequence_length=64, micro_batch_size=8)
    model = build_model(config, len(tokenizer), tokenizer.eos_token_id)
    for data, limit, kind in (("mini", None, "mini"), (None, 4, "part")):
        loop = InLoopHellaSwag(items, tokenizer, replace(config, evaluate_data=data, hellaswag_items=limit))
        assert loop.evaluate(model, Distributed())["hellaswag_kind"] == kind


# --- at the end of a run --------------------------------------------------------------------------------------------------


def finish_run(folder: RunFolder, **fields: object) -> list[str]:
    said: list[str] = []
    config = replace(load_config([str(folder.config)]), evaluate_data="mini", **fields)
    finish.finish_run(folder, config, said.append)
    return said


def test_a_single_item_has_no_standard_error_and_ends_no_run(folder: RunFolder) -> None:
    said = finish_run(folder, evaluate_tasks="hellaswag,hellaswag_completion", evaluate_limit=1)
    assert [line.partition(":")[0] for line in said[1:3]] == ["hellaswag (1 items)", "hellaswag_completion (1 items)"]
    assert "±" not in "".join(said) and "nan" not in "".join(said)
    records = [line for line in metrics(folder.path) if "hellaswag_n" in line]
    assert [set(line) for line in records] == [
        {"step", "hellaswag_n", "hellaswag_kind", f"{task}_acc", f"{task}_acc_norm"}
        for task in ("hellaswag", "hellaswag_completion")
    ]
    assert "NaN" not in (folder.evaluation / "hellaswag_completion.json").read_text()
    assert "| this model | hellaswag (hellaswag_mini.jsonl) | 1 | acc |" in (folder.export / "README.md").read_text()


@pytest.mark.parametrize("broken", ["record_results", "write_card"])
def test_what_fails_behind_the_export_is_told_and_fails_nothing_else(folder: RunFolder, monkeypatch, broken: str) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("acc_norm_stderr")

    monkeypatch.setattr(finish, "evaluate", lambda *arguments, **named: results("mini"))
    monkeypatch.setattr(finish, broken, fail)
    said = finish_run(folder, evaluate_tasks="hellaswag")
    assert said[-1] == "the results could not be written down: KeyError: 'acc_norm_stderr'"
    assert (folder.export / "README.md").is_file()


def test_the_kind_is_with_the_results_of_both_styles(folder: RunFolder, tmp_path: Path) -> None:
    tasks = ["hellaswag", "hellaswag_completion"]
    found = evaluate(str(folder.export), tasks, Distributed.alone(), "mini", tmp_path / "tasks", 2)
    assert [found["tasks"][task]["data"]["kind"] for task in tasks] == ["mini", "mini"]
