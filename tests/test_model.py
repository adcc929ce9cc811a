"""The model in training: causal attention without a mask, one graph, compiled once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from recipe.config import Config
from recipe.model import PretrainingModel, build_model

VOCAB = 100


@pytest.fixture
def model() -> PretrainingModel:
    torch._dynamo.reset()
    return build_model(Config(n_layer=2, n_head=2, n_embd=16, n_positions=32), VOCAB, 0)


def rows(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, 33))


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_is_causal_and_has_no_mask(model: PretrainingModel, monkeypatch, compiled: bool) -> None:
    calls = []
    attend = F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        calls.append((len(args), attn_mask, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    run = torch.compile(model.forward, backend="aot_eager", fullgraph=True) if compiled else model
    run(rows()).mean().backward()
    # Traced or run, each layer attends once; a third positional argument too many would be a mask.
    assert calls == [(3, None, True)] * 2


def test_the_compiled_attention_keeps_its_causal_kernel(model: PretrainingModel) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(model.forward, backend=backend, fullgraph=True)(rows())
    (graph,) = graphs
    attention = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert len(attention) == 2
    for node in attention:
        assert node.kwargs["attn_mask"] is None and node.kwargs["is_causal"] is True


def test_a_position_sees_nothing_behind_it(model: PretrainingModel) -> None:
    first = rows(1)
    second = first.clone()
    second[0, 20:] = (second[0, 20:] + 1) % VOCAB
    with torch.no_grad():
        a, b = model(first)[0], model(second)[0]
    # Loss t reads tokens 0..t and predicts t + 1.
    torch.testing.assert_close(a[:19], b[:19])
    assert (a[20:] - b[20:]).abs().max() > 1e-3


def test_no_recompilation_after_the_first_step_and_the_first_validation(model: PretrainingModel) -> None:
    counters.clear()
    run = torch.compile(model.forward, backend="aot_eager", dynamic=False, fullgraph=True)

    def train() -> None:
        run(rows()).mean().backward()
        model.zero_grad(set_to_none=True)

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            run(rows())
        model.train()

    validate()
    train()
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 2
    for _ in range(3):
        train()
    validate()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_projections_that_start_at_zero_make_every_block_the_identity() -> None:
    config = Config(n_layer=2, n_head=2, n_embd=16, n_positions=32)
    stock = dict(build_model(config, VOCAB, 0).named_parameters())
    model = build_model(replace(config, zero_init_projections=True), VOCAB, 0)
    zeroed = {name for name, p in model.named_parameters() if name.endswith("c_proj.weight")}
    assert len(zeroed) == 4
    for name, p in model.named_parameters():
        assert not p.any() if name in zeroed else torch.equal(p, stock[name]), name
        assert not name.endswith(".weight") or stock[name].any()
    hidden = torch.randn(2, 8, 16)
    for block in model.gpt2.transformer.h:
        assert torch.equal(block(hidden), hidden)
    model(rows()).mean().backward()
    # Only they and what reads the residual stream get a gradient at first; the rest follows when they have left zero.
    moved = {name for name, p in model.named_parameters() if p.grad.any()}
    assert zeroed < moved and not any("c_attn" in name or "c_fc" in name for name in moved)
