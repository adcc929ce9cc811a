"""Activation checkpointing: the same losses and gradients for less memory, eager and compiled, also under ZeRO-1."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels_in_torch import use_torch_for_kernels
from launch import TINY, launch, losses, options
from recipe.config import Config
from recipe.estimate import memory_by_part
from recipe.kernels import Kernels
from recipe.model import build_model

CONFIG = Config(n_layer=4, n_head=2, n_embd=64, sequence_length=64, n_positions=64, micro_batch_size=4)
VOCABULARY = 384  # a multiple of 128: nothing is padded


def step(config: Config, compiled: bool = False, kernels: Kernels | None = None, dtype: torch.dtype = torch.float32):
    """Losses [batch, sequence], gradients by name, and the bytes that the forward kept for the backward."""
    model = build_model(config, VOCABULARY, 0).to(dtype)
    model.use(kernels or Kernels())
    forward = torch.compile(model.forward, dynamic=False, fullgraph=True) if compiled else model.forward
    rows = torch.randint(VOCABULARY, (4, 65), generator=torch.Generator().manual_seed(1))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = forward(rows)
    found.mean().backward()
    return found.detach(), {name: p.grad for name, p in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("fused", [False, True])
def test_losses_and_gradients_are_equal_to_the_last_bit(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch_for_kernels(monkeypatch)
    kernels = Kernels(blocks=fused)
    plain_losses, plain, plain_bytes = step(CONFIG, kernels=kernels)
    twice_losses, twice, twice_bytes = step(replace(CONFIG, activation_checkpointing=True), kernels=kernels)
    assert torch.equal(plain_losses, twice_losses)
    assert plain.keys() == twice.keys() and all(grad.abs().max() > 0 for grad in plain.values())
    assert all(torch.equal(plain[name], twice[name]) for name in plain)
    assert twice_bytes < plain_bytes / 2
    stock_losses, stock, _ = step(CONFIG)
    assert torch.allclose(plain_losses, stock_losses, atol=1e-5)
    assert all(torch.allclose(plain[name], stock[name], atol=1e-6) for name in stock)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_it_saves_memory_and_changes_nothing(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch_for_kernels(monkeypatch)
    kernels = Kernels(blocks=fused)
    # One graph without breaks, as the engines compile it.
    plain_losses, plain, plain_bytes = step(CONFIG, compiled=True, kernels=kernels)
    twice_losses, twice, twice_bytes = step(replace(CONFIG, activation_checkpointing=True), compiled=True, kernels=kernels)
    assert torch.allclose(plain_losses, twice_losses, atol=1e-6)
    assert all(torch.allclose(plain[name], twice[name], atol=1e-7) for name in plain)
    assert twice_bytes < 0.6 * plain_bytes


def test_the_estimate_counts_what_is_kept() -> None:
    """The inputs of the blocks that a checkpointed forward keeps are 2 bytes x width for each token and layer, in bf16."""
    more = replace(CONFIG, n_layer=8, activation_checkpointing=True)
    fewer = replace(more, n_layer=4)
    kept = step(more, dtype=torch.bfloat16)[2] - step(fewer, dtype=torch.bfloat16)[2]
    estimated = memory_by_part(more, 1)["activations"] - memory_by_part(fewer, 1)["activations"]
    assert kept == estimated == 4 * 2 * 64 * 4 * 64
    plain = memory_by_part(replace(more, activation_checkpointing=False), 1)["activations"]
    assert plain - memory_by_part(more, 1)["activations"] == (8 * 30 - 32) * 64 * 4 * 64


def test_without_gradients_nothing_is_computed_twice() -> None:
    model = build_model(replace(CONFIG, activation_checkpointing=True), VOCABULARY, 0)
    calls = []
    model.gpt2.transformer.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    rows = torch.randint(VOCABULARY, (2, 65))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(rows)
        assert len(calls) == 1
        # Generating keeps its cache.
        cache = model.gpt2(rows[:, :8], use_cache=True).past_key_values
        assert cache.get_seq_length() == 8
    model(rows).mean().backward()
    assert len(calls) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_under_zero_1_is_the_same(tmp_path: Path, fineweb_folder: Path, precision: str) -> None:
    curves = []
    for value in ("false", "true"):
        run = TINY | {"data": fineweb_folder, "output_dir": tmp_path / value, "max_steps": 12, "precision": precision}
        launch("2cpu-zero1", *options(**run, activation_checkpointing=value))
        assert f"activation_checkpointing: {value}" in (tmp_path / value / "config.yaml").read_text()
        curves.append(losses(tmp_path / value))
    assert curves[0] == curves[1] and curves[0][0] - curves[0][-1] > 0.1
