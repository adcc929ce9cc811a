"""The optimizer's variants, each off by default, through the engines on one process and two, against the same reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from muon_rank import CONFIG, SAVED_STEP, STEPS, VARIANTS
from optimizer_reference import assert_same, largest, launcher, train_reference

PARALLEL = ["2cpu-zero1", "2cpu-ddp"]
ALL = ["cpu", *PARALLEL]
CHANGED = [name for name in VARIANTS if name != "muon"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[str, str], dict]]:
    base = tmp_path_factory.mktemp("variants")
    return {variant: launcher(base, variant) for variant in CHANGED}


@pytest.fixture(scope="module")
def references() -> dict[str, dict]:
    return {variant: train_reference(VARIANTS[variant], STEPS) for variant in CHANGED}


@pytest.mark.parametrize("variant", CHANGED)
@pytest.mark.parametrize("accelerate_file", ALL)
def test_fp32_follows_the_reference(results, references, accelerate_file: str, variant: str) -> None:
    found, reference = results[variant](accelerate_file, "fp32"), references[variant]
    assert reference["loss"][0] - reference["loss"][-1] > 0.4
    assert largest(found["history"]["loss"], reference["loss"], STEPS) < 1e-5
    assert largest(found["history"]["norm"], reference["norm"], STEPS) < 1e-5
    assert found["end"].keys() - {"step"} == reference["end"].keys()
    for name, tensor in reference["end"].items():
        assert (found["end"][name] - tensor).abs().max() < 1e-5, name
        assert tensor.any(), f"{name} was not trained"


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", CHANGED)
@pytest.mark.parametrize("accelerate_file", ALL)
def test_a_resumed_run_is_the_same_bit_for_bit(results, accelerate_file: str, variant: str, precision: str) -> None:
    found = results[variant](accelerate_file, precision)
    assert_same(found["loaded"], found["saved"])
    assert found["history_again"]["loss"] == found["history"]["loss"][SAVED_STEP:]
    assert_same(found["end_again"], found["end"])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", CHANGED)
@pytest.mark.parametrize("accelerate_file", PARALLEL)
def test_a_checkpoint_of_one_process_goes_on_over_two(results, accelerate_file: str, variant: str, precision: str) -> None:
    one, two = results[variant]("cpu", precision), results[variant](accelerate_file, precision)
    assert_same(two["loaded_other"], one["saved"])
    limit = 1e-5 if precision == "fp32" else 2e-3
    assert largest(two["history_other"]["loss"], one["history_again"]["loss"], STEPS - SAVED_STEP) < limit


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", CHANGED)
@pytest.mark.parametrize("accelerate_file", ALL)
def test_a_gradient_that_is_not_finite_changes_nothing(results, accelerate_file: str, variant: str, precision: str) -> None:
    found = results[variant](accelerate_file, precision)
    assert found["history_poisoned"]["skipped"] == [1.0]
    assert_same(found["after_poison"], found["before_poison"])
    assert found["history_cured"]["skipped"] == [0.0]
    assert all(tensor.isfinite().all() for tensor in found["after_cure"].values())


@pytest.mark.parametrize("accelerate_file", ALL)
def test_normuon_remembers_a_value_for_each_neuron(results, accelerate_file: str) -> None:
    saved = results["candidates"](accelerate_file, "fp32")["saved"]
    found = {name: tensor for name, tensor in saved.items() if name.startswith("second_momentum_buffer.")}
    assert len(found) == 4 * CONFIG.n_layer
    for name, moments in found.items():
        weight = saved[name.replace("second_momentum_buffer", "model")]
        assert moments.shape == weight.shape[1:] and (moments > 0).all(), name  # Conv1D is [inputs, outputs]
