"""GPT-2's blocks in training on a Hopper GPU: few passes over the activations, products by cuBLASLt.

The weights, their names and the function computed are those of the stock modules, which do everything else: generation,
scoring, other machines. Here

- GELU and its derivative ride in the epilogue of the product before them (recipe/cublaslt.py), where torch has a pass of its
  own over [tokens, 4 width], the widest activations of a block;
- what attention and MLP add to the residual stream is added where the next LayerNorm reads it, and the gradient of the bias of
  their last product is summed where that LayerNorm is differentiated;
- the gradients of queries, keys and values are joined and summed at once (recipe/passes.py).

Biases are added in fp32 before a product is rounded. Added to one that is rounded already they count for more than they are
while they are small: a sum that lies halfway between two bf16 numbers, as many then do, goes the way of the bias each time. In
the first steps of a run that moved the loss by 0.013 (docs/results.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Model
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from recipe import cublaslt, passes  # noqa: F401  # whose operators are called below

# Unasked torch does not cache a graph that holds an autograd.Function, as _Heads is one, and compiles it at each start. What it
# computes is part of the key: with another backward the cache is missed (seen with torch 2.13).
torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True


def hidden_states(transformer: GPT2Model, inputs: torch.Tensor, activation_checkpointing: bool = False) -> torch.Tensor:
    """What GPT2Model computes, without dropout and cache.

    Args:
        transformer: with bf16 weights on a GPU.
        inputs: token ids [batch, sequence].
        activation_checkpointing: keep of each block its input alone, and compute the rest again in the backward.
    Returns:
        [batch * sequence, width], past the last LayerNorm.
    """
    length = inputs.shape[1]
    x = (transformer.wte(inputs) + transformer.wpe.weight[:length]).flatten(0, 1)
    if activation_checkpointing:
        for block in transformer.h:
            x = checkpoint(_block, block, x, length, use_reentrant=False, preserve_rng_state=False)
        return _norm(transformer.ln_f, x)
    # Each block ends in the LayerNorm of the next one.
    normed = _norm(transformer.h[0].ln_1, x)
    for block, norm in zip(transformer.h, [*(block.ln_1 for block in transformer.h[1:]), transformer.ln_f], strict=True):
        x, branch = _branches(block, x, normed, length)
        x, normed = _add_norm(x, branch, block.mlp.c_proj.bias, norm)
    return normed


def _block(block: GPT2Block, x: torch.Tensor, length: int) -> torch.Tensor:
    x, branch = _branches(block, x, _norm(block.ln_1, x), length)
    bias = block.mlp.c_proj.bias
    # Which is in branch already: zeros, for the gradient alone.
    return x + branch + (bias - bias.detach())


def _branches(block: GPT2Block, x: torch.Tensor, normed: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From the residual stream [tokens, width] and its first LayerNorm: the stream past the attention, and what the MLP adds
    to it, differentiable but for its last bias."""
    attention, mlp = block.attn, block.mlp
    qkv = torch.ops.recipe.linear(normed, attention.c_attn.weight, attention.c_attn.bias.detach())
    heads = _Heads.apply(qkv, attention.c_attn.bias, attention.num_heads, length)
    context = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2).flatten(0, 1)
    branch = torch.ops.recipe.linear(context, attention.c_proj.weight, attention.c_proj.bias.detach())
    x, normed = _add_norm(x, branch, attention.c_proj.bias, block.ln_2)
    branch, _, _ = torch.ops.recipe.mlp(normed, mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias.detach())
    return x, branch


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _add_norm(
    x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor, norm: nn.LayerNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    total, normed, _, _ = torch.ops.recipe.add_norm(x, branch, bias, norm.weight, norm.bias, norm.eps)
    return total, normed


# --- queries, keys and values -----------------------------------------------------------------------------------------


class _Heads(torch.autograd.Function):
    """Views [batch, heads, sequence, width of a head] of qkv [tokens, 3 width] as queries, keys and values. Their gradients
    come back joined, and as that of the bias that qkv has in it. No operator of its own, since those cannot give views."""

    @staticmethod
    def forward(qkv: torch.Tensor, bias: torch.Tensor, heads: int, length: int) -> tuple[torch.Tensor, ...]:
        return qkv.view(-1, length, 3, heads, qkv.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        joined, sums = torch.ops.recipe.join(*(grad.transpose(1, 2).flatten(2).flatten(0, 1) for grad in grads))
        return joined, sums.to(joined.dtype), None, None


# --- products ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("recipe::linear", mutates_args=())
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x [tokens, in] @ weight [in, out] + bias, whose gradient is not taken here."""
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
    return *torch.ops.recipe.linear_backward(grad.contiguous(), x, weight), None


_linear.register_autograd(_differentiate_linear, setup_context=_save_linear)


@torch.library.custom_op("recipe::mlp", mutates_args=())
def _mlp(
    x: torch.Tensor, fc: torch.Tensor, fc_bias: torch.Tensor, proj: torch.Tensor, proj_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU(x [tokens, width] @ fc + fc_bias) @ proj + proj_bias, whose gradient is not taken here; and, for the backward, the
    GELU's input and output."""
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
    # The sum stands here, where the compiler sees it.
    return grad_x, grad_fc, grad_before.sum(0), grad_proj, None


_mlp.register_autograd(_differentiate_mlp, setup_context=_save_mlp)
