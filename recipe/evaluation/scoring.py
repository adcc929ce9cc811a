"""Log-likelihoods of continuations, for a model in training or any causal language model, shared out among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from recipe.distributed import Distributed
from recipe.loss import head_losses
from recipe.model import PretrainingModel

LENGTH_MULTIPLE = 32
"""Batches are this many tokens long or a multiple of it: a handful of shapes, which the allocator and the kernels keep."""
HEAD_TOKENS = 8192
"""Targets that the head takes at a time: their logits in fp32 are 1.6 GB at GPT-2's vocabulary."""

Losses = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(ids [batch, length], rows [n], columns [n], targets [n]) -> fp32 losses [n] in nats of the targets, each predicted at that
row and column of ids."""


class Interrupted(Exception):
    """An evaluation was given up, on all ranks alike; the message is the reason."""


def no_reason() -> None:
    """Never give up."""


class Request(NamedTuple):
    """What is asked of a model: the log-likelihood of tokens[start:] given tokens[:start]."""

    tokens: list[int]
    start: int


def training_losses(model: PretrainingModel) -> Losses:
    """Losses of the model in training. It runs as the eager GPT2LMHeadModel that it holds, so that lengths other than the
    training's compile nothing, and the head sees the targets alone."""

    def losses(ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = model.gpt2.transformer(input_ids=ids, use_cache=False).last_hidden_state[rows, columns]
        weight = model.gpt2.lm_head.weight
        parts = zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
        return torch.cat([head_losses(h, weight, t, model.vocab_size, model.kernels.head) for h, t in parts])

    return losses


def causal_losses(model: nn.Module) -> Losses:
    """Losses of any causal language model of transformers."""

    def losses(ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[rows, columns]
        return F.cross_entropy(logits.float(), targets, reduction="none")

    return losses


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode; the modes of the model's modules are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def score(
    requests: list[Request],
    losses: Losses,
    max_length: int,
    batch_tokens: int,
    distributed: Distributed,
    progress: Callable[[int, int], None] | None = None,
    reason_to_stop: Callable[[], str | None] = no_reason,
) -> tuple[np.ndarray, int]:
    """The log-likelihoods of the requests, on every rank.

    The batches are the same on any number of ranks, which take turns: so are the log-likelihoods.

    Args:
        max_length: the model's positions; a longer request is cut from the left, as lm-evaluation-harness does.
        batch_tokens: about how many tokens a batch holds, padding included.
        progress: called with the batches done and to do on this rank.
        reason_to_stop: asked before each batch, by all ranks together.
    Returns:
        log-likelihoods [requests] in nats, and how many requests were cut.
    Raises:
        Interrupted: if there is a reason.
    """
    device = distributed.device
    sums = torch.zeros(len(requests), dtype=torch.float64, device=device)
    whole = list(_batches(requests, max_length, batch_tokens))
    batches = whole[distributed.rank :: distributed.num_ranks]
    for done in range(-(-len(whole) // distributed.num_ranks)):
        if reason := reason_to_stop():
            raise Interrupted(reason)
        if done == len(batches):
            break  # the others have one more
        length, members = batches[done]
        if progress:
            progress(done, len(batches))
        ids, places = _lay_out([_cut(requests[member], max_length) for member in members], length)
        rows, columns, targets = distributed.to_device(places)
        owners = distributed.to_device(np.array(members)[places[0]])
        sums.index_add_(0, owners, -losses(distributed.to_device(ids), rows, columns, targets).double())
    if progress:
        progress(len(batches), len(batches))
    truncated = sum(len(request.tokens) > max_length + 1 for request in requests)
    # A request is one rank's: adding the others' zeros changes nothing.
    return distributed.sum(sums.cpu().numpy()), truncated


def _cut(request: Request, max_length: int) -> Request:
    excess = max(0, len(request.tokens) - max_length - 1)
    return Request(request.tokens[excess:], request.start - excess)


def _batches(requests: list[Request], max_length: int, batch_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Padded length and members of each batch, the longest first: too little memory shows at once."""
    order = sorted(range(len(requests)), key=lambda n: -len(requests[n].tokens))
    begin = 0
    while begin < len(order):
        inputs = min(len(requests[order[begin]].tokens) - 1, max_length)
        length = min(-(-inputs // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max_length)
        count = max(1, batch_tokens // length)
        yield length, order[begin : begin + count]
        begin += count


def _lay_out(requests: list[Request], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [requests, length], padded at the end; and [3, targets]: the row and the column that predict a target, and its
    id."""
    whole = np.zeros((len(requests), length + 1), dtype=np.int64)
    for row, request in zip(whole, requests, strict=True):
        row[: len(request.tokens)] = request.tokens
    spans = [np.arange(max(request.start, 1), len(request.tokens)) for request in requests]
    rows = np.repeat(np.arange(len(requests)), [len(span) for span in spans])
    positions = np.concatenate(spans)
    # The token at a position is predicted one before it.
    return np.ascontiguousarray(whole[:, :-1]), np.stack([rows, positions - 1, whole[rows, positions]])
