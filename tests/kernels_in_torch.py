"""What the GPU's kernels of a block compute, written out in torch: by them the fused blocks can be differentiated on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recipe import cublaslt, passes


def use_torch_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "product", product)


def product(a, b, epilogue=cublaslt.DEFAULT, bias=None, aux=None):
    out = a @ b
    if epilogue in (cublaslt.BIAS, cublaslt.GELU_AUX_BIAS):
        out = out + bias
    if epilogue == cublaslt.GELU_AUX_BIAS:
        aux.copy_(out)
        out = F.gelu(out, approximate="tanh")
    if epilogue == cublaslt.DGELU:
        out = torch.ops.aten.gelu_backward(out, aux, approximate="tanh")
    return out


@passes.add_norm.register_kernel("cpu")
def add_norm(x, branch, bias, weight, shift, eps):
    total = x + (branch + bias)
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
