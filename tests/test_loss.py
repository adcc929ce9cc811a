"""The head's loss: the custom operator's derivative and padding, with the kernel's arithmetic written out in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recipe import loss
from recipe.loss import head_losses

TOKENS, WIDTH, VOCAB, PADDED = 24, 16, 50, 64


Z_LOSS = 0.01


def kernel_in_torch(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, gradient: bool, z_loss: float = 0.0
) -> torch.Tensor:
    """What recipe/loss_kernel.py does on a GPU."""
    x = logits[:, :vocab_size].float().clone()
    log_sum = x.logsumexp(1, keepdim=True)
    losses = (log_sum - x.gather(1, targets[:, None])).squeeze(1)
    if gradient:
        logits.zero_()
        probability = (x - log_sum).exp() * (1 + 2 * z_loss * log_sum)
        logits[:, :vocab_size] = (probability - F.one_hot(targets, vocab_size)).to(logits.dtype)
    return losses


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.setattr(loss, "_cross_entropy", kernel_in_torch)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(PADDED, WIDTH, generator=generator)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.rand(TOKENS, generator=generator)


def reference(hidden, weight, targets, scale, z_loss):
    logits = (hidden @ weight.T)[:, :VOCAB]
    losses = F.cross_entropy(logits, targets, reduction="none")
    trained = losses + z_loss * logits.logsumexp(1) ** 2
    return losses, *torch.autograd.grad((trained * scale).sum(), (hidden, weight))


@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
@pytest.mark.parametrize("compiled", [False, True])
def test_operator_has_the_loss_and_gradients_of_cross_entropy(inputs, compiled: bool, z_loss: float) -> None:
    hidden, weight, targets, scale = inputs

    def by_operator(hidden, weight):
        return torch.ops.recipe.head_loss(hidden, weight, targets, VOCAB, z_loss)[0]

    function = torch.compile(by_operator, backend="aot_eager") if compiled else by_operator
    losses = function(hidden, weight)
    gradients = torch.autograd.grad((losses * scale).sum(), (hidden, weight))
    expected = reference(hidden, weight, targets, scale, z_loss)
    for ours, theirs in zip((losses, *gradients), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert gradients[1][VOCAB:].abs().max() == 0


@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
@pytest.mark.parametrize("compiled", [False, True])
def test_plain_path_has_the_same_loss_and_gradients(inputs, compiled: bool, z_loss: float) -> None:
    hidden, weight, targets, scale = inputs
    function = torch.compile(head_losses, backend="aot_eager", fullgraph=True) if compiled else head_losses
    losses = function(hidden, weight, targets, VOCAB, "plain", z_loss)
    gradients = torch.autograd.grad((losses * scale).sum(), (hidden, weight))
    for ours, theirs in zip((losses, *gradients), reference(hidden, weight, targets, scale, z_loss), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert gradients[1][VOCAB:].abs().max() == 0


@pytest.mark.parametrize("head", ["plain", "fused"])
def test_z_loss_is_in_the_gradients_and_not_in_the_losses(inputs, head: str) -> None:
    hidden, weight, targets, _ = inputs
    without, with_it = (head_losses(hidden, weight, targets, VOCAB, head, z_loss) for z_loss in (0.0, Z_LOSS))
    assert torch.equal(without, with_it)
    gradients = [torch.autograd.grad(losses.sum(), (hidden, weight)) for losses in (without, with_it)]
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(*gradients, strict=True))
    with torch.no_grad():
        alone = head_losses(hidden, weight, targets, VOCAB, head, Z_LOSS)
    torch.testing.assert_close(alone, without)


def test_loss_alone_is_the_same(inputs) -> None:
    hidden, weight, targets, _ = inputs
    with torch.no_grad():
        alone = torch.ops.recipe.head_loss_only(hidden, weight, targets, VOCAB)
    torch.testing.assert_close(alone, head_losses(hidden, weight, targets, VOCAB, "plain"))
