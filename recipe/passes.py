"""The passes of a block beside its products and its attention, each over its activations once: operators of torch.

These are bound by the memory alone, and a sum over all tokens, such as the gradient of a bias, is read from where something
else has it at hand: the compiler takes a pass of its own for each (docs/results.md).
"""

from __future__ import annotations

from functools import cache

import torch

_NORM, _JOIN = (1, 4), (4, 4, 24)
_BACKWARD, _WIDE_BACKWARD = (2, 4, 8), (1, 2, 8)
"""Rows and warps of a program of each kernel and, where programs sum over rows, how many of them a multiprocessor has: enough
loads in flight, and few sums to add in the end. On an H100 the fastest of those tried at a width of 1,024, at 768 and 1,600 at
most 7% slower; a wide row is one of more than 1,024 (docs/results.md)."""


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()


# --- the residual stream and its LayerNorm ----------------------------------------------------------------------------


@torch.library.custom_op("recipe::add_norm", mutates_args=())
def add_norm(
    x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x + branch and its LayerNorm.

    Args:
        x, branch: contiguous [tokens, width].
        bias: [width], which branch has in it already: its gradient is a sum of what passes here.
        weight, shift: [width], LayerNorm's.
    Returns:
        both, [tokens, width]; and for the backward the mean of each row of the sum and the inverse of its standard deviation,
        fp32 [tokens].
    """
    from recipe.pass_kernels import add_norm_kernel

    (tokens, width), (rows, warps) = x.shape, _NORM
    total, normed = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    add_norm_kernel[(-(-tokens // rows),)](
        x, branch, weight, shift, total, normed, mean, rstd, tokens, width, eps, ROWS=rows, BLOCK=_block(width),
        num_warps=warps,
    )  # fmt: skip
    return total, normed, mean, rstd


@add_norm.register_fake
def _(x, branch, bias, weight, shift, eps):
    a_row = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), a_row, torch.empty_like(a_row)


@torch.library.custom_op("recipe::add_norm_backward", mutates_args=())
def add_norm_backward(
    grad_total: torch.Tensor | None,
    grad_normed: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the gradients of add_norm's first two results, contiguous, the first of which may be missing: that of x and of
    branch, [tokens, width], and, fp32 [3, width], those of weight, shift and bias."""
    from recipe.pass_kernels import add_norm_backward_kernel

    tokens, width = total.shape
    rows, warps, programs = _BACKWARD if width <= 1024 else _WIDE_BACKWARD
    programs = min(tokens, programs * _multiprocessors(total.device))
    grad, sums = torch.empty_like(total), total.new_empty(programs, 3, width, dtype=torch.float32)
    add_norm_backward_kernel[(programs,)](
        grad_total, grad_normed, total, mean, rstd, weight, grad, sums, tokens, width, HAS_TOTAL=grad_total is not None,
        ROWS=rows, BLOCK=_block(width), num_warps=warps,
    )  # fmt: skip
    return grad, sums.sum(0)


@add_norm_backward.register_fake
def _(grad_total, grad_normed, total, mean, rstd, weight):
    return torch.empty_like(total), weight.new_empty(3, len(weight), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, mean, rstd, inputs[3])


def _differentiate(ctx, grad_total, grad_normed, _mean, _rstd):
    total, mean, rstd, weight = ctx.saved_tensors
    grad_total = grad_total if grad_total is None else grad_total.contiguous()
    grad, sums = torch.ops.recipe.add_norm_backward(grad_total, grad_normed.contiguous(), total, mean, rstd, weight)
    of_weight, of_shift, of_bias = sums.to(weight.dtype).unbind(0)
    return grad, grad, of_bias, of_weight, of_shift, None


add_norm.register_autograd(_differentiate, setup_context=_save)


# --- queries, keys and values -----------------------------------------------------------------------------------------


@torch.library.custom_op("recipe::join", mutates_args=())
def join(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Three matrices [tokens, width] side by side, [tokens, 3 width], and the sums of that over the tokens, fp32 [3 width]."""
    from recipe.pass_kernels import join_kernel

    (tokens, width), (rows, warps, programs) = q.shape, _JOIN
    programs = min(tokens, programs * _multiprocessors(q.device) // 3)
    joined, sums = q.new_empty(tokens, 3 * width), q.new_empty(programs, 3 * width, dtype=torch.float32)
    join_kernel[(programs, 3)](
        q.contiguous(), k.contiguous(), v.contiguous(), joined, sums, tokens, width, ROWS=rows, BLOCK=_block(width),
        num_warps=warps,
    )  # fmt: skip
    return joined, sums.sum(0)


@join.register_fake
def _(q, k, v):
    tokens, width = q.shape
    return q.new_empty(tokens, 3 * width), q.new_empty(3 * width, dtype=torch.float32)
