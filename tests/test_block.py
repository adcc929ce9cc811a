"""The fused blocks compute what GPT-2's own do, with cuBLASLt's products written out in torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from recipe import block, cublaslt
from recipe.block import fuse_blocks


def product_in_torch(a, b, epilogue=cublaslt.DEFAULT, bias=None, aux=None):
    """What cuBLASLt does on a GPU."""
    out = a @ b
    if epilogue in (cublaslt.BIAS, cublaslt.GELU_AUX_BIAS):
        out = out + bias
    if epilogue == cublaslt.GELU_AUX_BIAS:
        aux.copy_(out)
        out = F.gelu(out, approximate="tanh")
    if epilogue == cublaslt.DGELU:
        out = torch.ops.aten.gelu_backward(out, aux, approximate="tanh")
    return out


@pytest.fixture
def models(monkeypatch) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """A model, and a copy of it with fused blocks."""
    monkeypatch.setattr(block.cublaslt, "product", product_in_torch)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_layer=2, n_head=2, n_embd=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    stock = GPT2LMHeadModel(config)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases and LayerNorms too
    fused = copy.deepcopy(stock)
    fuse_blocks(fused)
    return stock, fused


@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_and_gradients_are_the_stock_models(models, compiled: bool) -> None:
    stock, fused = models
    ids = torch.randint(0, 64, (3, 16))
    run = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiled else fused
    for model, call in ((stock, stock), (fused, run)):
        model.zero_grad()
        hidden = call(input_ids=ids, use_cache=False).logits
        (hidden * torch.linspace(-1, 1, 64)).sum().backward()
        model.result = hidden.detach()
    torch.testing.assert_close(fused.result, stock.result, atol=1e-5, rtol=1e-5)
    for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_fused_products_are_used_in_training_alone(models, monkeypatch) -> None:
    _, fused = models
    calls = []
    monkeypatch.setattr(block.cublaslt, "product", lambda *a, **k: calls.append(1) or product_in_torch(*a, **k))
    ids = torch.randint(0, 64, (1, 5))
    with torch.no_grad():
        fused(input_ids=ids)
    assert not calls
    fused(input_ids=ids).logits.sum().backward()
    assert len(calls) == 2 * (4 + 8)  # four products forward and two for each backward


def test_weights_keep_their_names(models) -> None:
    stock, fused = models
    assert stock.state_dict().keys() == fused.state_dict().keys()
    assert type(fused.transformer.h[0].mlp) is type(stock.transformer.h[0].mlp)


def test_the_compiled_graph_can_be_cached(models) -> None:
    # torch's cache of compiled training graphs passes over an autograd.Function: 20 s of each start on an H100.
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(models[1], backend=backend, fullgraph=True)(input_ids=torch.randint(0, 64, (1, 16)), use_cache=False)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert any("mlp" in target for target in targets)
    assert not any("autograd_function" in target for target in targets)
