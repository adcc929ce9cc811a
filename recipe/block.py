"""GPT-2's block on a Hopper GPU: its matrix products with bias and GELU, forward and backward, by cuBLASLt.

torch runs GELU and its derivative as passes of their own over [tokens, 4 width], the widest activations of the block, and takes
cuBLASLt's first guess at an algorithm. Here both ride in the epilogue of the product before them, and the algorithms are
measured. Weights, names and the function computed are those of the stock modules.
"""

from __future__ import annotations

import types

import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from recipe import cublaslt


def fuse_blocks(gpt2: GPT2LMHeadModel) -> None:
    """Let the blocks of a bf16 model on a GPU train with fused products. Without gradients they run as they were, so that
    text of any length can be generated and scored without measuring algorithms anew."""
    for block in gpt2.transformer.h:
        for module, forward in (
            (block.attn.c_attn, _linear_forward),
            (block.attn.c_proj, _linear_forward),
            (block.mlp, _mlp_forward),
        ):
            module.forward = types.MethodType(forward, module)


def _linear_forward(self: Conv1D, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return Conv1D.forward(self, x)
    return torch.ops.recipe.linear(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


def _mlp_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return type(self).forward(self, x)
    fc, proj = self.c_fc, self.c_proj
    out, _, _ = torch.ops.recipe.mlp(x.flatten(0, -2), fc.weight, fc.bias, proj.weight, proj.bias)
    return out.unflatten(0, x.shape[:-1])


@torch.library.custom_op("recipe::linear", mutates_args=())
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x [tokens, in] @ weight [in, out] + bias."""
    return cublaslt.product(x, weight, cublaslt.BIAS, bias)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("recipe::linear_backward", mutates_args=())
def _linear_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight."""
    return cublaslt.product(grad, weight.T), cublaslt.product(x.T, grad)


@_linear_backward.register_fake
def _(grad, x, weight):
    return torch.empty_like(x), torch.empty_like(weight)


def _save_linear(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _differentiate_linear(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.recipe.linear_backward(grad.contiguous(), x, weight)
    return grad_x, grad_weight, grad.sum(0)


_linear.register_autograd(_differentiate_linear, setup_context=_save_linear)


@torch.library.custom_op("recipe::mlp", mutates_args=())
def _mlp(
    x: torch.Tensor, fc: torch.Tensor, fc_bias: torch.Tensor, proj: torch.Tensor, proj_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU(x [tokens, width] @ fc + fc_bias) @ proj + proj_bias; and, for the backward, the GELU's input and output."""
    before = x.new_empty(x.shape[0], fc.shape[1])
    after = cublaslt.product(x, fc, cublaslt.GELU_AUX_BIAS, fc_bias, before)
    return cublaslt.product(after, proj, cublaslt.BIAS, proj_bias), before, after


@_mlp.register_fake
def _(x, fc, fc_bias, proj, proj_bias):
    wide = x.new_empty(x.shape[0], fc.shape[1])
    return x.new_empty(x.shape[0], proj.shape[1]), wide, torch.empty_like(wide)


@torch.library.custom_op("recipe::mlp_backward", mutates_args=())
def _mlp_backward(
    grad: torch.Tensor, x: torch.Tensor, before: torch.Tensor, after: torch.Tensor, fc: torch.Tensor, proj: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, fc, the GELU's input and proj."""
    grad_before = cublaslt.product(grad, proj.T, cublaslt.DGELU, aux=before)
    grad_proj = cublaslt.product(after.T, grad)
    return cublaslt.product(grad_before, fc.T), cublaslt.product(x.T, grad_before), grad_before, grad_proj


@_mlp_backward.register_fake
def _(grad, x, before, after, fc, proj):
    return torch.empty_like(x), torch.empty_like(fc), torch.empty_like(before), torch.empty_like(proj)


def _save_mlp(ctx, inputs, output) -> None:
    x, fc, _, proj, _ = inputs
    _, before, after = output
    ctx.mark_non_differentiable(before, after)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, before, after, fc, proj)


def _differentiate_mlp(ctx, grad, _before, _after):
    x, before, after, fc, proj = ctx.saved_tensors
    grad_x, grad_fc, grad_before, grad_proj = torch.ops.recipe.mlp_backward(grad.contiguous(), x, before, after, fc, proj)
    # The sums stand here, where the compiler sees them.
    return grad_x, grad_fc, grad_before.sum(0), grad_proj, grad.sum(0)


_mlp.register_autograd(_differentiate_mlp, setup_context=_save_mlp)
