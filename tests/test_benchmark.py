"""scripts/benchmark.py measures what it says."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import make_documents
from launch import ROOT, TINY, environment, options
from recipe import benchmark
from recipe.distributed import Distributed
from recipe.parsing import load_config
from recipe.plan import make_plan
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


def test_steps_are_timed_at_the_full_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def next_batch(count: int) -> np.ndarray:
        rows.append(count)
        return np.zeros((count, 1025), np.int32)

    @contextlib.contextmanager
    def open_stream(*_: object) -> Iterator[tuple]:
        yield SimpleNamespace(next_batch=next_batch), SimpleNamespace(vocab_size=257, end_of_text=0)

    monkeypatch.setattr(benchmark, "open_stream", open_stream)
    monkeypatch.setattr(benchmark, "build_model", lambda *_: SimpleNamespace(kernels=""))
    monkeypatch.setattr(benchmark, "make_engine", lambda *_: SimpleNamespace(train_step=lambda *_: None))
    words = ["--batch_tokens", "16384", "--micro_batch_size", "2", "--batch_ramp", "2048x900"]
    config = load_config([str(ROOT / "configs" / "gpt2-124m.yaml"), *words])
    benchmark.benchmark_training(config, make_plan(config, 1), Distributed.alone(), 3, whole=True)
    assert len(rows) > 3 and set(rows) == {16}, "the speed is that of so many rows, whatever a ramp begins with"


@pytest.mark.slow
def test_paths_are_compared(command: list[str]) -> None:
    result = json.loads(run("parity", command, "--steps", "12", "--json"))
    assert result["first_loss"] - result["last_loss"] > 0.05, "it must learn, or equal losses say nothing"
    plain = np.array(result["losses"]["plain"])
    for name, path in result["paths"].items():
        assert 0 < path["largest"] < 1e-2  # other orders of summing, not other sums
        difference = np.array(result["losses"][name]) - plain
        assert path["largest"] == pytest.approx(np.abs(difference).max()) and len(difference) == 12
        assert path["mean_signed"] == pytest.approx(difference.mean())
        assert path["at_step"] == np.abs(difference).argmax() + 1


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
