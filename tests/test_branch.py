"""A decay that branches off a stable checkpoint: one long run yields models at several budgets. With Muon, under ZeRO-1."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import TINY, launch, metrics, options
from recipe.files import sha256

FIELDS = TINY | {
    "n_layer": 3, "optimizer": "muon", "precision": "fp32", "schedule": "trapezoidal", "warmup_steps": 4, "save_every": 6,
    "keep_checkpoints": 9,
}  # fmt: skip
LONG, FROM, SHORT, DECAY = 24, 6, 18, 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, fineweb_folder: Path) -> tuple[Path, Path]:
    """A long run, and a shorter one that leaves it at step FROM, in a folder of its own."""
    folder = tmp_path_factory.mktemp("branch")
    fields = FIELDS | {"data": fineweb_folder, "decay_steps": DECAY}
    long, short = folder / "long", folder / "short"
    launch("2cpu-zero1", *options(**fields, output_dir=long, max_steps=LONG))
    start = long / "checkpoints" / f"step-{FROM:08d}"
    output = launch("2cpu-zero1", *options(**fields, output_dir=short, max_steps=SHORT, resume=start)).stdout
    assert f"continuing from {start} at step {FROM}" in output
    return long, short


def training(run: Path) -> dict[int, dict]:
    return {r["step"]: r for r in metrics(run) if "train_loss" in r}


def test_the_stable_part_is_that_of_the_long_run(runs) -> None:
    long, short = (training(run) for run in runs)
    assert list(short) == list(range(FROM + 1, SHORT + 1)) and list(long) == list(range(1, LONG + 1))
    # The first step of the decay is still at the peak, and its update shows in the loss after next.
    for step in range(FROM + 1, SHORT - DECAY + 3):
        for key in ("train_loss", "grad_norm", "tokens"):
            assert short[step][key] == long[step][key], (step, key)
    assert short[SHORT]["train_loss"] != long[SHORT]["train_loss"]
    name = f"checkpoints/step-{SHORT - DECAY:08d}"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert sha256(runs[0] / name / file) == sha256(runs[1] / name / file)


def test_both_decay_to_the_end(runs) -> None:
    for run, last in zip(runs, (LONG, SHORT), strict=True):
        rates = {step: record["lr"] / TINY["learning_rate"] for step, record in training(run).items()}
        assert rates[last - DECAY] == rates[last - DECAY + 1] == 1
        assert [rates[step] for step in range(last - DECAY + 2, last + 1)] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
        assert (run / "export" / "model.safetensors").is_file()
