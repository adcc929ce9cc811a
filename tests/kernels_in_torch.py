"""What the GPU's kernels of a block compute, written out in torch: by them the fused blocks can be differentiated on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recipe import block, cublaslt, passes
from recipe.model import PretrainingModel


def use_torch_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "product", product)


def product(a, b, epilogue=cublaslt.DEFAULT, bias=None, aux=None):
    # In fp32 to the end, as on the GPU: rounded in between, a small bias would be lost, and so would what it does to a loss.
    out = a.float() @ b.float()
    if epilogue in (cublaslt.BIAS, cublaslt.GELU_AUX_BIAS):
        out += bias
    if epilogue == cublaslt.GELU_AUX_BIAS:
        aux.copy_(out)
        out = F.gelu(out, approximate="tanh")
    if epilogue == cublaslt.DGELU:
        out = torch.ops.aten.gelu_backward(out, aux.float(), approximate="tanh")
    return out.to(a.dtype)


@torch.no_grad()
def shift_by_small_biases(model: PretrainingModel, rows: torch.Tensor, bias: float) -> tuple[float, float]:
    """How far the first block's residual stream moves on average, in units of `bias`, if the bias of its attention's or of its
    MLP's last product becomes `bias` instead of zero.

    Args:
        model: in bf16, training by fused blocks.
        rows: token ids [batch, sequence].
    """
    transformer, length = model.gpt2.transformer, rows.shape[1]
    first = transformer.h[0]

    def means() -> tuple[float, float]:
        x = (transformer.wte(rows) + transformer.wpe.weight[:length]).flatten(0, 1)
        past_attention, branch = block._branches(first, x, block._norm(first.ln_1, x), length)
        past_mlp, _ = block._add_norm(past_attention, branch, first.mlp.c_proj.bias, first.ln_1)
        return float(past_attention.double().mean()), float(past_mlp.double().mean())

    attention, mlp = first.attn.c_proj.bias, first.mlp.c_proj.bias
    attention.zero_(), mlp.zero_()
    before = means()
    attention.fill_(bias)
    with_attention, _ = means()
    attention.zero_(), mlp.fill_(bias)
    _, with_mlp = means()
    return (with_attention - before[0]) / bias, (with_mlp - before[1]) / bias


@passes.add_norm.register_kernel("cpu")
def add_norm(x, branch, bias, weight, shift, eps):
    total = x + branch
    normed, mean, rstd = torch.ops.aten.native_layer_norm(total, [x.shape[1]], weight, shift, eps)
    return total, normed, mean.flatten().float(), rstd.flatten().float()


@passes.add_norm_backward.register_kernel("cpu")
def add_norm_backward(grad_total, grad_normed, total, mean, rstd, weight):
    statistics = (mean[:, None].to(total.dtype), rstd[:, None].to(total.dtype))
    grad, of_weight, of_shift = torch.ops.aten.native_layer_norm_backward(
        grad_normed, total, [total.shape[1]], *statistics, weight, torch.zeros_like(weight), [True, True, True]
    )
    if grad_total is not None:
        grad = grad_total + grad
    return grad, torch.stack([of_weight, of_shift, grad.sum(0)]).float()


@passes.join.register_kernel("cpu")
def join(q, k, v):
    joined = torch.cat([q, k, v], 1)
    return joined, joined.float().sum(0)
