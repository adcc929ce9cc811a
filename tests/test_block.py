"""The fused blocks compute what GPT-2's own do, with cuBLASLt's products and the Triton passes written out in torch."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F

from kernels_in_torch import product, shift_by_small_biases, use_torch_for_kernels
from recipe import block
from recipe.config import Config
from recipe.kernels import Kernels, know_operators
from recipe.model import PretrainingModel, build_model

VOCABULARY = 128
CONFIG = Config(n_layer=3, n_head=2, n_embd=16, sequence_length=16, n_positions=32)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> tuple[PretrainingModel, PretrainingModel]:
    """A model, and a copy of it that trains by fused blocks."""
    use_torch_for_kernels(monkeypatch)
    torch.manual_seed(0)
    stock = build_model(CONFIG, VOCABULARY, 0)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases and LayerNorms too
    fused = copy.deepcopy(stock)
    fused.use(Kernels(blocks=True))
    return stock, fused


def rows(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, CONFIG.sequence_length + 1))


@pytest.mark.parametrize("compiled", [False, True])
def test_losses_and_gradients_are_the_stock_models(models, compiled: bool) -> None:
    stock, fused = models
    batch = rows()
    run = torch.compile(fused.forward, backend="aot_eager", fullgraph=True) if compiled else fused
    found = []
    for call in (stock, run):
        losses = call(batch)
        (losses * torch.linspace(0, 1, losses.numel()).view_as(losses)).sum().backward()
        found.append(losses.detach())
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_attention_is_sdpa_causal_and_without_a_mask(models, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append((len(a), k)) or sdpa(*a, **k))
    models[1](rows())
    assert calls == CONFIG.n_layer * [(3, {"is_causal": True})]


def test_the_fused_products_are_used_in_training_alone(models, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = models[1]
    calls = []
    monkeypatch.setattr(block.cublaslt, "product", lambda *a, **k: calls.append(1) or product(*a, **k))
    with torch.no_grad():
        fused(rows())
        fused.gpt2.generate(rows(1), max_new_tokens=2, pad_token_id=0)
    assert not calls
    fused(rows()).sum().backward()
    assert len(calls) == CONFIG.n_layer * (4 + 8)  # four products forward and two for each backward


def test_a_bias_far_below_the_spacing_of_bf16_counts_for_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # As all biases are in the first steps. Added to a product that is rounded already, this one counts for 5 and 16 times as
    # much (at GPT-2's width for 29 and 85), and parity with the plain path was missed by it.
    use_torch_for_kernels(monkeypatch)
    model = build_model(Config(n_layer=2, n_head=2, n_embd=64, sequence_length=64, n_positions=64), VOCABULARY, 0).bfloat16()
    model.use(Kernels(blocks=True))
    moved = shift_by_small_biases(model, torch.randint(0, VOCABULARY, (128, 64)), 1e-6)
    assert moved == pytest.approx((1, 1), abs=0.2)


def test_weights_keep_their_names(models) -> None:
    stock, fused = models
    assert stock.state_dict().keys() == fused.state_dict().keys()


def test_the_compiled_graph_can_be_cached(models) -> None:
    # Compiling it anew takes 20 s of each start on an H100, and torch caches an autograd.Function only where it is allowed.
    from torch._functorch._aot_autograd.autograd_cache import check_cacheable

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(models[1].forward, backend=backend, fullgraph=True)(rows())
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert any("add_norm" in target for target in targets)
    check_cacheable(graph)


def test_the_compiler_calls_the_operators_without_writing_about_them(models, caplog: pytest.LogCaptureFixture) -> None:
    # What torch 2.11 writes about an operator that it was not told of grows exponentially with the layers before it.
    import torch._inductor.config

    know_operators()
    with torch._inductor.config.patch(force_disable_caches=True), caplog.at_level("INFO", "torch._inductor.graph"):
        logging.getLogger("torch._inductor.graph").addHandler(caplog.handler)
        try:
            torch.compile(models[1].forward, fullgraph=True)(rows()).mean().backward()
        finally:
            logging.getLogger("torch._inductor.graph").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "implicit fallback" in record.msg]
