"""scripts/benchmark.py measures what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import make_documents
from launch import ROOT, TINY, environment, options
from recipe.tokenizer import train_tokenizer


@pytest.fixture
def command(tmp_path: Path, fineweb_folder: Path) -> list[str]:
    """The benchmark of a tiny model, but for its kind."""
    train_tokenizer(make_documents(50), 400).save_pretrained(tmp_path / "tokenizer")
    fields = TINY | {"data": fineweb_folder, "tokenizer": tmp_path / "tokenizer", "max_steps": 20, "max_epochs": 1000}
    return options(**fields)


def run(kind: str, command: list[str], *more: str) -> str:
    words = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), kind, *command, *more]
    return subprocess.run(words, env=environment(), check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "step"])
def test_training_is_measured(command: list[str], kind: str) -> None:
    result = json.loads(run(kind, command, "--steps", "4", "--json"))
    tokens = 1024 if kind == "step" else 256
    assert result["tokens_per_second"] == pytest.approx(tokens / result["step_ms"] * 1000)
    assert result["engine"] == "ReplicatedEngine" and result["kernels_used"].startswith("torch's products")
    assert result["mfu"] is None and result["first_step_seconds"] > 0
    table = run(kind, command, "--steps", "4")
    assert "tokens_per_second" in table and "n/a" in table


@pytest.mark.slow
def test_paths_are_compared(command: list[str]) -> None:
    result = json.loads(run("parity", command, "--steps", "12", "--json"))
    assert result["first_loss"] - result["last_loss"] > 0.05, "it must learn, or equal losses say nothing"
    for path in result["paths"].values():
        assert 0 < path["largest"] < 1e-2  # other orders of summing, not other sums


def test_the_loader_benchmark_reads_the_text(tmp_path: Path, fineweb_folder: Path) -> None:
    train_tokenizer(make_documents(50), 400).save_pretrained(tmp_path / "tokenizer")
    fields = TINY | {"data": fineweb_folder, "tokenizer": tmp_path / "tokenizer", "max_steps": 20, "max_epochs": 1000}
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "loader", *options(**fields), "--seconds", "1"]
    done = subprocess.run([*command, "--json"], env=environment(), check=True, capture_output=True, text=True, timeout=60)
    result = json.loads(done.stdout)
    assert result["batches"] > 10 and result["tokens_per_second"] > 10_000
    assert 0 < result["first_batch_seconds"] < 10
    assert result["virtual_shards"] == 16 and result["tokenised_by"] == "tiktoken"
    bad = subprocess.run([*command, "--n_layr", "2"], env=environment(), capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2 and "did you mean n_layer" in bad.stderr
