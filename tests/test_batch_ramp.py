"""A run whose batch grows: the same tokens under every engine, from the start and from a checkpoint within the ramp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import PRETRAIN, TINY, environment, launch, losses, metrics, options
from recipe.data.provenance import BatchTracer

# One, three and four micro-batches a step on two ranks, changing where the count so far is no multiple of the next.
FIELDS = TINY | {
    "micro_batch_size": 2, "batch_tokens": 1024, "batch_ramp": "256x3,768x2", "max_steps": 8, "warmup_steps": 2,
    "save_every": 2, "keep_checkpoints": 9, "precision": "fp32", "optimizer": "muon",
}  # fmt: skip
TOKENS = [256, 512, 768, 1536, 2304, 3328, 4352, 5376]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fineweb_folder: Path) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("ramp") / "run"
    command = [sys.executable, PRETRAIN, *options(**FIELDS, data=fineweb_folder, output_dir=folder)]
    subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), check=True, capture_output=True, timeout=120)
    return folder


def test_tokens_are_counted(run: Path) -> None:
    assert [r["tokens"] for r in metrics(run) if "train_loss" in r] == TOKENS
    assert [(r["step"], r["tokens"]) for r in metrics(run) if "val_loss" in r] == [(0, 0), (8, 5376)]
    assert json.loads((run / "status.json").read_text())["tokens"] == 5376
    manifests = sorted((run / "checkpoints").glob("step-*/MANIFEST.json"))
    assert [json.loads(path.read_text())["tokens"] for path in manifests] == [TOKENS[step - 1] for step in (2, 4, 6, 8)]


def test_zero1_goes_on_within_the_ramp(run: Path, tmp_path: Path, fineweb_folder: Path) -> None:
    folder, start = tmp_path / "zero1", run / "checkpoints" / "step-00000002"
    launch("2cpu-zero1", *options(**FIELDS, data=fineweb_folder, output_dir=folder, resume=start))
    records = [r for r in metrics(folder) if "train_loss" in r]
    assert [(r["step"], r["tokens"]) for r in records] == list(enumerate(TOKENS, start=1))[2:]
    assert [r["train_loss"] for r in records] == pytest.approx(losses(run)[2:], abs=1e-5)
    ours = [r["grad_norm"] for r in records]
    assert ours == pytest.approx([r["grad_norm"] for r in metrics(run) if "train_loss" in r][2:], abs=1e-4)


def test_a_step_of_the_ramp_can_be_traced(run: Path) -> None:
    """The rows of the steps, end to end, are those of steps of one size."""
    tracer = BatchTracer(run)
    grown = [tracer.trace(step)[0] for step in range(1, 9)]
    assert [len(rows) for rows in grown] == [4, 4, 4, 12, 12, 16, 16, 16]
    tracer._positions = tracer._positions[:1]
    tracer.config.batch_ramp = None
    even = [tracer.trace(step)[0] for step in range(1, 6)]
    assert np.array_equal(np.concatenate(grown)[:80], np.concatenate(even))
