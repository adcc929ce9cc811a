"""The passes of a block beside its products and its attention, each over its activations once.

These are bound by the memory alone, and a sum over all tokens, such as the gradient of a bias, is read from where something
else has it at hand: the compiler takes a pass of its own for each (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

_NORM, _JOIN = (1, 4), (4, 4, 24)
_BACKWARD, _WIDE_BACKWARD = (2, 4, 8), (1, 2, 8)
"""Rows and warps of a program of each kernel and, where programs sum over rows, how many of them a multiprocessor has: enough
loads in flight, and few sums to add in the end. The fastest on an H100 or within 3% of it, at widths of 768, 1,024 and 1,600; a
wide row is one of more than 1,024 (docs/results.md)."""


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()


def add_norm(
    x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x + branch + bias and its LayerNorm.

    Args:
        x, branch: contiguous [tokens, width].
        bias, weight, shift: [width]; the last two are LayerNorm's.
    Returns:
        both, [tokens, width]; the mean of each row of the sum and the inverse of its standard deviation, fp32 [tokens].
    """
    from recipe.pass_kernels import add_norm_kernel

    (tokens, width), (rows, warps) = x.shape, _NORM
    total, normed = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    add_norm_kernel[(-(-tokens // rows),)](
        x, branch, bias, weight, shift, total, normed, mean, rstd, tokens, width, eps, ROWS=rows, BLOCK=_block(width),
        num_warps=warps,
    )  # fmt: skip
    return total, normed, mean, rstd


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


def join(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Three contiguous matrices [tokens, width] side by side, [tokens, 3 width], and the sums of that over the tokens, fp32
    [3 width]."""
    from recipe.pass_kernels import join_kernel

    (tokens, width), (rows, warps, programs) = parts[0].shape, _JOIN
    programs = min(tokens, programs * _multiprocessors(parts[0].device) // 3)
    joined = parts[0].new_empty(tokens, 3 * width)
    sums = parts[0].new_empty(programs, 3 * width, dtype=torch.float32)
    join_kernel[(programs, 3)](*parts, joined, sums, tokens, width, ROWS=rows, BLOCK=_block(width), num_warps=warps)
    return joined, sums.sum(0)
