"""One process, ZeRO-1 and data parallel compute the same run."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import TINY, launch, losses, options

STEPS = 50


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory, fineweb_folder: Path):
    """Losses of a run by accelerate file and precision; each is launched once."""
    known: dict[tuple[str, str], list[float]] = {}

    def run(accelerate_file: str, precision: str) -> list[float]:
        key = (accelerate_file, precision)
        if key not in known:
            folder = tmp_path_factory.mktemp("run") / "run"
            fields = TINY | {"data": fineweb_folder, "max_steps": STEPS, "precision": precision, "output_dir": folder}
            output = launch(accelerate_file, *options(**fields)).stdout
            engine = "Zero1Engine" if "zero1" in accelerate_file else "ReplicatedEngine"
            ranks = 2 if accelerate_file.startswith("2") else 1
            assert f"{engine}, {precision}" in output
            assert f"{ranks} ranks" in output
            known[key] = losses(folder)
        return known[key]

    return run


def largest_difference(a: list[float], b: list[float], steps: int) -> float:
    assert len(a) == len(b) == STEPS
    return max(abs(x - y) for x, y in zip(a[:steps], b[:steps], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("accelerate_file", ["2cpu-zero1", "2cpu-ddp"])
def test_two_processes_match_one_in_fp32(curve, accelerate_file: str) -> None:
    one, two = curve("cpu", "fp32"), curve(accelerate_file, "fp32")
    assert one[0] - one[-1] > 1.0, "the model must learn, or equal losses say nothing"
    assert largest_difference(one, two, 20) < 1e-4
    assert largest_difference(one, two, 50) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("accelerate_file", ["2cpu-zero1", "2cpu-ddp"])
def test_two_processes_match_one_in_bf16(curve, accelerate_file: str) -> None:
    one, two = curve("cpu", "bf16"), curve(accelerate_file, "bf16")
    assert one[0] - one[-1] > 1.0
    assert largest_difference(one, two, 50) < 2e-3


def test_precisions_differ(curve) -> None:
    assert largest_difference(curve("cpu", "fp32"), curve("cpu", "bf16"), 50) > 1e-5
