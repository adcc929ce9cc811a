"""scripts/benchmark.py measures what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import make_documents
from launch import ROOT, TINY, environment, options
from recipe.tokenizer import train_tokenizer


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
