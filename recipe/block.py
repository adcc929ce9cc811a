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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from recipe import cublaslt

_STRIPE = 512


def fuse_blocks(gpt2: GPT2LMHeadModel) -> None:
    """Let the blocks of a bf16 model on a GPU train with fused products. Without gradients they run as they were, so that
    text of any length can be generated and scored without measuring algorithms anew."""
    for block in gpt2.transformer.h:
        for module, forward in (
            (block.attn, _attention_forward),
            (block.attn.c_proj, _linear_forward),
            (block.mlp, _mlp_forward),
        ):
            module.forward = types.MethodType(forward, module)


def _attention_forward(self: nn.Module, hidden_states: torch.Tensor, **arguments) -> tuple[torch.Tensor, None]:
    if not torch.is_grad_enabled():
        return type(self).forward(self, hidden_states, **arguments)
    batch, length, _ = hidden_states.shape
    parts = _SplitLinear.apply(hidden_states.flatten(0, 1), self.c_attn.weight, self.c_attn.bias)
    q, k, v = (part.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for part in parts)
    out, _ = sdpa_attention_forward(self, q, k, v, None, scaling=self.scaling, is_causal=True)
    return self.c_proj(out.reshape(batch, length, -1)), None


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


class _SplitLinear(torch.autograd.Function):
    """`recipe::linear` whose output comes as its three thirds. The gradients of the thirds are put side by side and summed for
    the bias in one pass, where autograd needs one for each."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, weight)
        return torch.ops.recipe.linear(x, weight, bias).chunk(3, dim=1)

    @staticmethod
    def backward(ctx, q, k, v):
        x, weight = ctx.saved_tensors
        grad, sums = torch.ops.recipe.join(q, k, v)
        grad_x, grad_weight = torch.ops.recipe.linear_backward(grad, x, weight)
        return grad_x, grad_weight, sums.sum(0).to(grad.dtype)


@torch.library.custom_op("recipe::join", mutates_args=())
def _join(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v [tokens, width] side by side, and the sums of their columns over stripes of rows, fp32 [stripes, 3 width]."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, sums = q.new_empty(len(q), 3 * q.shape[1]), q.new_empty(_stripes(q), 3 * q.shape[1], dtype=torch.float32)
    _join_into(q, k, v, out, sums)
    return out, sums


def _join_into(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sums: torch.Tensor) -> None:
    from recipe.block_kernel import join_kernel

    tokens, width = q.shape
    grid = (-(-width // 128), len(sums), 3)
    join_kernel[grid](q, k, v, out, sums, tokens, width, ROWS=_STRIPE, STEP=32, COLUMNS=128, num_warps=4)


def _stripes(q: torch.Tensor) -> int:
    return -(-q.shape[0] // _STRIPE)


@_join.register_fake
def _(q, k, v):
    width = 3 * q.shape[1]
    return q.new_empty(q.shape[0], width), q.new_empty(_stripes(q), width, dtype=torch.float32)


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
