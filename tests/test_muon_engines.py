"""Muon through the engines, on one process and two, against a reference that does the obvious thing matrix by matrix."""

from __future__ import annotations

import pytest
import torch

from muon_rank import CONFIG, LONG, SAVED_STEP, STEPS
from optimizer_reference import assert_same, largest, launcher, train_reference

PARALLEL = ["2cpu-zero1", "2cpu-ddp"]
ALL = ["cpu", *PARALLEL]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory):
    return launcher(tmp_path_factory.mktemp("muon"), "muon")


@pytest.fixture(scope="module")
def reference() -> dict:
    return train_reference(CONFIG)


# --- exactness ----------------------------------------------------------------------------------------------------


def test_the_reference_learns_and_is_clipped(reference) -> None:
    assert reference["loss"][0] - reference["loss"][STEPS - 1] > 0.4
    assert reference["loss"][0] - reference["loss"][-1] > 1.0
    assert min(reference["norm"]) > CONFIG.max_grad_norm


@pytest.mark.parametrize("accelerate_file", ALL)
def test_fp32_follows_the_reference(results, reference, accelerate_file: str) -> None:
    found = results(accelerate_file, "fp32")
    assert found["engine"] == ("Zero1Engine" if "zero1" in accelerate_file else "ReplicatedEngine")
    assert largest(found["history"]["loss"], reference["loss"], STEPS) < 1e-5
    assert largest(found["history"]["norm"], reference["norm"], STEPS) < 1e-5  # of gradients, before clipping
    for name, tensor in reference["end"].items():
        assert (found["end"][name] - tensor).abs().max() < 1e-5, name
        moved = (tensor - found["start"].get(name, torch.zeros(()))).abs().max()
        least = {"model": 1e-3, "momentum_buffer": 1e-4}.get(name.split(".")[0], 0)
        assert moved > least, f"{name} was not trained"


@pytest.mark.parametrize("accelerate_file", ALL)
def test_newton_schulz_in_bf16_follows_the_reference(results, reference, accelerate_file: str) -> None:
    found = results(accelerate_file, "fp32")["history_bf16"]["loss"]
    assert 1e-6 < largest(found, reference["loss"], LONG) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("accelerate_file", ALL)
def test_a_bf16_run_follows_the_reference(results, reference, accelerate_file: str) -> None:
    found = results(accelerate_file, "bf16")
    assert largest(found["history"]["loss"], reference["loss"], STEPS) < 2e-3
    # The optimizers would not mind sums of the ranks' gradients, nor halves of them.
    ratios = [a / b for a, b in zip(found["history"]["norm"], reference["norm"], strict=False)]
    assert len(ratios) == STEPS and max(ratios) < 1.02 and min(ratios) > 0.98
    assert largest(found["history_bf16"]["loss"], reference["loss"], LONG) < 2e-3


@pytest.mark.parametrize("accelerate_file", ALL)
def test_the_work_is_shared_out(results, accelerate_file: str) -> None:
    work = results(accelerate_file, "fp32")["work"]
    assert sum(work) == 6 * CONFIG.n_layer, "a matrix is orthogonalised twice, or not at all"
    # One and a half of three blocks each: the c_fc in the middle is done by either.
    assert sorted(work) == ([18] if accelerate_file == "cpu" else [8, 10]), work


def test_deepspeed_does_not_wait_for_the_device(results) -> None:
    assert results("2cpu-zero1", "fp32")["waits"] == 0


# --- state --------------------------------------------------------------------------------------------------------


def test_the_state_names_what_each_algorithm_remembers(results) -> None:
    names = results("cpu", "fp32")["saved"].keys()
    assert sum(name.startswith("momentum_buffer.") for name in names) == 4 * CONFIG.n_layer
    assert all(".h." in name and name.endswith(".weight") for name in names if name.startswith("momentum_buffer."))
    for kind in ("exp_avg.", "exp_avg_sq."):
        assert {"transformer.wte.weight", "transformer.wpe.weight"} < {n.removeprefix(kind) for n in names}
        assert f"{kind}transformer.h.0.mlp.c_fc.bias" in names and f"{kind}transformer.h.0.mlp.c_fc.weight" not in names


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accelerate_file", ALL)
def test_a_resumed_run_is_the_same_bit_for_bit(results, accelerate_file: str, precision: str) -> None:
    found = results(accelerate_file, precision)
    assert_same(found["loaded"], found["saved"])
    assert found["history_again"]["loss"] == found["history"]["loss"][SAVED_STEP:]
    assert_same(found["end_again"], found["end"])
    assert not torch.equal(found["saved"]["model.transformer.wte.weight"], found["end"]["model.transformer.wte.weight"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accelerate_file", PARALLEL)
def test_a_checkpoint_of_one_process_goes_on_over_two(results, accelerate_file: str, precision: str) -> None:
    one, two = results("cpu", precision), results(accelerate_file, precision)
    assert_same(two["start"], one["start"])
    assert_same(two["loaded_other"], one["saved"])
    limit = 1e-5 if precision == "fp32" else 2e-3
    assert largest(two["history_other"]["loss"], one["history_again"]["loss"], STEPS - SAVED_STEP) < limit


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accelerate_file", ALL)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing(results, accelerate_file: str, precision: str) -> None:
    found = results(accelerate_file, precision)
    assert found["history_poisoned"]["skipped"] == [1.0]
    assert_same(found["after_poison"], found["before_poison"])
    assert found["history_cured"]["skipped"] == [0.0]
    for name in ("model.transformer.h.1.mlp.c_fc.weight", "momentum_buffer.transformer.h.1.mlp.c_fc.weight", "step"):
        assert found["after_cure"][name].isfinite().all()
        assert not torch.equal(found["after_cure"][name], found["after_poison"][name])
