"""The head's loss: the custom operator's derivative and padding, with the kernel's arithmetic written out in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recipe import loss
from recipe.loss import head_losses

TOKENS, WIDTH, VOCAB, PADDED = 24, 16, 50, 64


def kernel_in_torch(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, gradient: bool) -> torch.Tensor:
    """What recipe/loss_kernel.py does on a GPU."""
    x = logits[:, :vocab_size].float().clone()
    log_sum = x.logsumexp(1, keepdim=True)
    losses = (log_sum - x.gather(1, targets[:, None])).squeeze(1)
    if gradient:
        logits.zero_()
        logits[:, :vocab_size] = ((x - log_sum).exp() - F.one_hot(targets, vocab_size)).to(logits.dtype)
    return losses


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.setattr(loss, "_cross_entropy", kernel_in_torch)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(PADDED, WIDTH, generator=generator)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.rand(TOKENS, generator=generator)


def reference(hidden, weight, targets, scale):
    losses = F.cross_entropy((hidden @ weight.T)[:, :VOCAB], targets, reduction="none")
    return losses, *torch.autograd.grad((losses * scale).sum(), (hidden, weight))


@pytest.mark.parametrize("compiled", [False, True])
def test_operator_has_the_loss_and_gradients_of_cross_entropy(inputs, compiled: bool) -> None:
    hidden, weight, targets, scale = inputs

    def by_operator(hidden, weight):
        return torch.ops.recipe.head_loss(hidden, weight, targets, VOCAB)[0]

    function = torch.compile(by_operator, backend="aot_eager") if compiled else by_operator
    losses = function(hidden, weight)
    gradients = torch.autograd.grad((losses * scale).sum(), (hidden, weight))
    expected = reference(hidden, weight, targets, scale)
    for ours, theirs in zip((losses, *gradients), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert gradients[1][VOCAB:].abs().max() == 0


def test_plain_path_has_the_same_loss_and_gradients(inputs) -> None:
    hidden, weight, targets, scale = inputs
    losses = head_losses(hidden, weight, targets, VOCAB, "plain")
    gradients = torch.autograd.grad((losses * scale).sum(), (hidden, weight))
    for ours, theirs in zip((losses, *gradients), reference(hidden, weight, targets, scale), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert gradients[1][VOCAB:].abs().max() == 0


def test_loss_alone_is_the_same(inputs) -> None:
    hidden, weight, targets, _ = inputs
    with torch.no_grad():
        alone = torch.ops.recipe.head_loss_only(hidden, weight, targets, VOCAB)
    torch.testing.assert_close(alone, head_losses(hidden, weight, targets, VOCAB, "plain"))
