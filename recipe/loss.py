"""The language-model head and its cross-entropy, without logits in fp32.

On a GPU one kernel turns the bf16 logits into losses and, in place, into their own gradient: it reads them once and writes
them once, where the compiler's softmax passes over them four times (docs/results.md). llm.c does the same in its fused
classifier. With `fp8`, the three products of the head, a sixth of the model's arithmetic, run at Hopper's fp8 rate.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from recipe import cublaslt

Head = Literal["plain", "fused", "fp8"]

FP8_MAX = 448.0
"""Largest number of e4m3, the format of activations and weights."""
FP8_GRADIENT_SCALE = 2.0**15
"""Brings softmax - onehot, within [-1, 1], to the range of e5m2, whose largest number is 57,344."""

_FP8_TILE, _FP8_WARPS = (64, 64), 4
_LOSS_ONLY, _WITH_GRADIENT = (1024, 2), (4096, 8)
"""Tokens and vocabulary of a program that makes the fp8 gradient, and its warps; vocabulary that a program takes at a time for
losses, and its warps. The fastest of those tried (H100, 65,536 tokens, docs/results.md)."""


def head_losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, head: Head, z_loss: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of each target in nats.

    With `z_loss` the values are the same, and the gradients those of cross-entropy + z_loss * logsumexp(logits)^2 (Chowdhery et
    al. 2022, PaLM, section 5): what is trained on is more than what is told.

    Args:
        hidden: [tokens, width].
        weight: head [padded vocabulary, width]; rows from `vocab_size` on take no part.
        targets: ids [tokens], below `vocab_size`.
        head: how; `fp8` needs tokens, width and padded vocabulary to be multiples of 16 and holds for training alone.
    Returns:
        fp32 [tokens].
    """
    if head == "plain":
        logits = F.linear(hidden, weight)[:, :vocab_size].float()
        return with_z_loss(F.cross_entropy(logits, targets, reduction="none"), logits, z_loss)
    if not torch.is_grad_enabled():
        return torch.ops.recipe.head_loss_only(hidden, weight, targets, vocab_size)
    if head == "fp8":
        return torch.ops.recipe.head_loss_fp8(hidden, weight, targets, vocab_size, z_loss)[0]
    return torch.ops.recipe.head_loss(hidden, weight, targets, vocab_size, z_loss)[0]


def with_z_loss(losses: torch.Tensor, logits: torch.Tensor, z_loss: float) -> torch.Tensor:
    """Losses [tokens] of logits [tokens, vocabulary] as they are, with the gradient of z_loss * logsumexp(logits)^2 besides."""
    if not z_loss or not torch.is_grad_enabled():
        return losses
    penalty = z_loss * logits.logsumexp(-1).square()
    return losses + (penalty - penalty.detach())


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, gradient: bool, z_loss: float = 0.0
) -> torch.Tensor:
    """Losses of logits [tokens, padded vocabulary], which are overwritten by their gradient, z-loss included, if `gradient`."""
    from recipe.loss_kernel import cross_entropy_kernel

    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block, warps = _WITH_GRADIENT if gradient else _LOSS_ONLY
    block = min(block, 1 << (vocab_size - 1).bit_length())
    cross_entropy_kernel[(len(logits),)](
        logits, losses, targets, logits.stride(0), vocab_size, logits.shape[1], GRADIENT=gradient, Z_LOSS=z_loss, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return losses


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # torch's own choice of algorithm for this product is a tenth slower than the best (docs/results.md).
    if hidden.dtype == torch.bfloat16 and cublaslt.available(hidden.device):
        return cublaslt.product(hidden, weight.T)
    return hidden @ weight.T


# --- without gradients ------------------------------------------------------------------------------------------------


@torch.library.custom_op("recipe::head_loss_only", mutates_args=())
def _head_loss_only(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return _cross_entropy(hidden @ weight.T, targets, vocab_size, gradient=False)


@_head_loss_only.register_fake
def _(hidden, weight, targets, vocab_size):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


# --- bf16 or fp32 -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("recipe::head_loss", mutates_args=())
def _head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [tokens], and the gradient of their sum, z-loss included, by the logits, [tokens, padded vocabulary]."""
    logits = _logits(hidden, weight)
    return _cross_entropy(logits, targets, vocab_size, gradient=True, z_loss=z_loss), logits


@_head_loss.register_fake
def _(hidden, weight, targets, vocab_size, z_loss):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32), hidden.new_empty(hidden.shape[0], weight.shape[0])


def _save(ctx, inputs, output) -> None:
    hidden, weight, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, *output[1:])


def _differentiate(ctx, grad_losses, _):
    hidden, weight, grad_logits = ctx.saved_tensors
    # The scale of each row goes to the narrow side of the products: [tokens, width] instead of [tokens, vocabulary].
    scale = grad_losses.unsqueeze(1)
    grad_hidden = (grad_logits @ weight * scale).to(hidden.dtype)
    grad_weight = grad_logits.T @ (hidden * scale).to(hidden.dtype)
    return grad_hidden, grad_weight, None, None, None


_head_loss.register_autograd(_differentiate, setup_context=_save)


# --- fp8 --------------------------------------------------------------------------------------------------------------


def _quantize(x: torch.Tensor, direct: bool, transposed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [rows, width] in e4m3, scaled so that its largest element is FP8_MAX: as it lies, [rows, width], and transposed,
    [width, rows], each empty if not wanted; and the scale that gives x back."""
    from recipe.loss_kernel import fp8_quantize_kernel

    rows, width = x.shape
    scale = FP8_MAX / torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).clamp(min=1e-12)
    out = torch.empty((rows, width) if direct else (0, 0), dtype=torch.float8_e4m3fn, device=x.device)
    across = torch.empty((width, rows) if transposed else (0, 0), dtype=torch.float8_e4m3fn, device=x.device)
    grid = (-(-width // 64), -(-rows // 64))
    fp8_quantize_kernel[grid](x, scale, out, across, rows, width, DIRECT=direct, TRANSPOSED=transposed, BLOCK=64, num_warps=4)
    return out, across, scale.reciprocal()


@torch.library.custom_op("recipe::head_loss_fp8", mutates_args=())
def _head_loss_fp8(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses [tokens]; their sum's gradient, z-loss included, by the logits times FP8_GRADIENT_SCALE in e5m2, [tokens, padded
    vocabulary] and transposed; and the weight in e4m3, [width, padded vocabulary], with its scale."""
    from recipe.loss_kernel import fp8_gradient_kernel

    hidden8, _, hidden_scale = _quantize(hidden, direct=True, transposed=False)
    weight8, weight8_across, weight_scale = _quantize(weight, direct=True, transposed=True)
    logits = torch._scaled_mm(
        hidden8, weight8.T, scale_a=hidden_scale, scale_b=weight_scale, out_dtype=hidden.dtype, use_fast_accum=True
    )
    losses = _cross_entropy(logits, targets, vocab_size, gradient=False)
    tokens, width = logits.shape
    gradient = torch.empty_like(logits, dtype=torch.float8_e5m2)
    transposed = torch.empty(width, tokens, dtype=torch.float8_e5m2, device=logits.device)
    rows, columns = _FP8_TILE
    fp8_gradient_kernel[(-(-width // columns), -(-tokens // rows))](
        logits, losses, targets, gradient, transposed.view(torch.int32), tokens, vocab_size, width, SCALE=FP8_GRADIENT_SCALE,
        Z_LOSS=z_loss, ROWS=rows, COLUMNS=columns, num_warps=_FP8_WARPS,
    )  # fmt: skip
    return losses, gradient, transposed, weight8_across, weight_scale


@_head_loss_fp8.register_fake
def _(hidden, weight, targets, vocab_size, z_loss):
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty(tokens, vocabulary, dtype=torch.float8_e5m2),
        hidden.new_empty(vocabulary, tokens, dtype=torch.float8_e5m2),
        hidden.new_empty(width, vocabulary, dtype=torch.float8_e4m3fn),
        hidden.new_empty((), dtype=torch.float32),
    )


@torch.library.custom_op("recipe::head_gradients_fp8", mutates_args=())
def _head_gradients_fp8(
    scaled_hidden: torch.Tensor,
    gradient: torch.Tensor,
    transposed: torch.Tensor,
    weight8_across: torch.Tensor,
    weight_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gradient @ weight [tokens, width], and gradient^T @ scaled_hidden [padded vocabulary, width]."""
    _, hidden8_across, hidden_scale = _quantize(scaled_hidden, direct=False, transposed=True)
    gradient_scale = torch.full_like(weight_scale, 1 / FP8_GRADIENT_SCALE)
    options = {"scale_a": gradient_scale, "out_dtype": scaled_hidden.dtype, "use_fast_accum": False}
    return (
        torch._scaled_mm(gradient, weight8_across.T, scale_b=weight_scale, **options),
        torch._scaled_mm(transposed, hidden8_across.T, scale_b=hidden_scale, **options),
    )


@_head_gradients_fp8.register_fake
def _(scaled_hidden, gradient, transposed, weight8_across, weight_scale):
    return torch.empty_like(scaled_hidden), scaled_hidden.new_empty(len(transposed), scaled_hidden.shape[1])


def _differentiate_fp8(ctx, grad_losses, *_):
    hidden, _weight, *saved = ctx.saved_tensors
    scale = grad_losses.unsqueeze(1)
    grad_hidden, grad_weight = torch.ops.recipe.head_gradients_fp8((hidden * scale).to(hidden.dtype), *saved)
    return (grad_hidden * scale).to(hidden.dtype), grad_weight, None, None, None


_head_loss_fp8.register_autograd(_differentiate_fp8, setup_context=_save)
