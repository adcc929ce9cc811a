"""The language-model head and its cross-entropy, without logits in fp32.

On a GPU one kernel turns the bf16 logits into losses and, in place, into their own gradient: it reads them once and writes
them once, where the compiler's softmax passes over them four times (13 of 127 ms of a 124M micro-step on an H100,
docs/results.md). llm.c does the same in its fused classifier.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def head_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Cross-entropy of each target in nats.

    Args:
        hidden: [tokens, width].
        weight: head [padded vocabulary, width]; rows from `vocab_size` on take no part.
        targets: ids [tokens], below `vocab_size`.
    Returns:
        fp32 [tokens].
    """
    if hidden.is_cuda:
        if torch.is_grad_enabled():
            return torch.ops.recipe.head_loss(hidden, weight, targets, vocab_size)[0]
        return torch.ops.recipe.head_loss_only(hidden, weight, targets, vocab_size)
    logits = F.linear(hidden, weight)[:, :vocab_size].float()
    return F.cross_entropy(logits, targets, reduction="none")


@torch.library.custom_op("recipe::head_loss", mutates_args=())
def _head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [tokens], and the gradient of their sum by the logits, [tokens, padded vocabulary]."""
    logits = hidden @ weight.T
    return _cross_entropy(logits, targets, vocab_size, gradient=True), logits


@_head_loss.register_fake
def _(hidden, weight, targets, vocab_size):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32), hidden.new_empty(hidden.shape[0], weight.shape[0])


@torch.library.custom_op("recipe::head_loss_only", mutates_args=())
def _head_loss_only(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return _cross_entropy(hidden @ weight.T, targets, vocab_size, gradient=False)


@_head_loss_only.register_fake
def _(hidden, weight, targets, vocab_size):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    hidden, weight, _, _ = inputs
    ctx.save_for_backward(hidden, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_losses, _):
    hidden, weight, grad_logits = ctx.saved_tensors
    # The scale of each row goes to the narrow side of the products: [tokens, width] instead of [tokens, vocabulary].
    scale = grad_losses.unsqueeze(1)
    grad_hidden = (grad_logits @ weight * scale).to(hidden.dtype)
    grad_weight = grad_logits.T @ (hidden * scale).to(hidden.dtype)
    return grad_hidden, grad_weight, None, None


_head_loss.register_autograd(_backward, setup_context=_save)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, gradient: bool) -> torch.Tensor:
    """Losses of logits [tokens, padded vocabulary], which are overwritten by their gradient if `gradient`."""
    from recipe.loss_kernel import cross_entropy_kernel

    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(4096, 1 << (vocab_size - 1).bit_length())
    cross_entropy_kernel[(len(logits),)](
        logits, losses, targets, logits.stride(0), vocab_size, logits.shape[1], GRADIENT=gradient, BLOCK=block, num_warps=8
    )
    return losses
