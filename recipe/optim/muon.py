"""Muon for the matrices of the blocks, AdamW for the rest, in one optimizer whose Muon part is shared out among the ranks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from recipe.optim.cautious import CautiousAdamW, chunks, decay_where_agreeing
from recipe.optim.orthogonalize import orthogonalize
from recipe.optim.sharing import BlockMatrix, Exchange, Sharing, all_to_all

BATCH_ELEMENTS = 2**26
"""Elements of matrices that are orthogonalised at a time, which bounds the memory: 128 MiB in bf16 and a few times that for
what the products need. The 124M model's are one batch of each shape."""


class MuonAdamW(CautiousAdamW):
    """CautiousAdamW in groups with `algorithm` "adamw", Muon (Keller Jordan 2024) in those with "muon".

    A group for Muon has one parameter: this rank's slice of the flat parameters that `matrices`, a list of BlockMatrix,
    describes in their order, as ZeRO-1 makes it. Further keys: `lr`, `momentum`, `weight_decay`. Momentum is element-wise and
    stays with the slice (`momentum_buffer`); each matrix is orthogonalised on one rank.

        m <- momentum m + (1 - momentum) g
        W <- (1 - lr weight_decay) W - lr scale orthogonalize((1 - momentum) g + momentum m)

    With a `cautious_decay` instead of `weight_decay`, the decay is cautious (recipe/optim/cautious.py).

    As under fused AdamW, where the tensor `found_inf` is 1 nothing changes, without a look from the host. Gradients of Muon's
    groups are overwritten.

    Args:
        table: coefficients of Newton-Schulz by iteration.
        ns_dtype: its precision.
        exchange: sends tensors between the ranks.
        keywords: as of torch.optim.AdamW.
    """

    def __init__(
        self,
        groups: list[dict],
        table: tuple[tuple[float, float, float], ...],
        ns_dtype: torch.dtype,
        rank: int,
        num_ranks: int,
        exchange: Exchange = all_to_all,
        **keywords: Any,
    ):
        super().__init__(groups, **keywords)
        self.table, self.ns_dtype = table, ns_dtype
        self.rank, self.num_ranks, self.exchange = rank, num_ranks, exchange

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["algorithm"] == "adamw"]
        try:
            # ZeRO-1 in fp32 steps one group at a time. Of no groups at all torch says that all are capturable, and warns.
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["algorithm"] == "muon":
                self._muon_step(group)

    def _muon_step(self, group: dict) -> None:
        (weights,) = group["params"]
        direction = self._direction(weights, group)
        if "sharing" not in group:
            # Only now: ZeRO-1 puts the slice into the group after the optimizer was made.
            group["sharing"] = Sharing(group["matrices"], weights.numel(), self.num_ranks)
        sharing: Sharing = group["sharing"]
        matrices: list[BlockMatrix] = group["matrices"]
        if group["weight_decay"]:
            weights.mul_(1 - group["lr"] * group["weight_decay"] * self.keep)
        cautious = bool(group.get("cautious_decay"))
        # Whether to decay shows only in the whole update, which then takes the direction's place before it is applied.
        flat, rate = (direction, 1.0) if cautious else (weights, -group["lr"])
        work = _Batches(overwrite=cautious)
        for index, piece in sharing.whole(self.rank):
            for source, target in zip(
                matrices[index].split(piece.of(direction)), matrices[index].split(piece.of(flat)), strict=True
            ):
                work.add(source, target, rate * matrices[index].scale)
        updates = {}
        if sharing.split:
            wholes = sharing.collect(self.rank, direction, self.ns_dtype, self.exchange)
            for index, whole in wholes.items():
                updates[index] = torch.zeros_like(whole)
                for source, target in zip(matrices[index].split(whole), matrices[index].split(updates[index]), strict=True):
                    work.add(source, target, 1.0)
        work.run(self.table, self.ns_dtype)
        if sharing.split:
            like = direction.new_empty(0, dtype=self.ns_dtype)
            for index, piece, update in sharing.hand_back(self.rank, updates, like, self.exchange):
                _put(piece.of(flat), update, rate * matrices[index].scale, overwrite=cautious)
        if cautious:
            for w, update in chunks(weights, direction):
                decay_where_agreeing(w, w * update, group["lr"] * group["cautious_decay"], self.keep)
                w.sub_(update, alpha=group["lr"])

    def _direction(self, weights: torch.Tensor, group: dict) -> torch.Tensor:
        """The momentum after this step's gradient, Nesterov's look ahead included, in the place of the gradient; zero if
        nothing may change."""
        gradient, momentum = weights.grad, group["momentum"]
        state = self.state[weights]
        if "momentum_buffer" not in state:
            state |= initial_state("muon", weights)
        keep, found_inf = self.keep, getattr(self, "found_inf", None)
        if found_inf is not None:
            gradient.masked_fill_(found_inf.bool(), 0)  # 0 x NaN would be NaN
        state["momentum_buffer"].lerp_(gradient, (1 - momentum) * keep)
        return gradient.lerp_(state["momentum_buffer"], momentum * keep)


class _Batches:
    """Matrices to orthogonalise, collected by shape.

    Args:
        overwrite: put the results in the place of their targets, which may be their sources, instead of adding them.
    """

    def __init__(self, overwrite: bool = False):
        self.overwrite = overwrite
        self._items: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, float]]] = defaultdict(list)

    def add(self, source: torch.Tensor, target: torch.Tensor, factor: float) -> None:
        """Let `factor` times the orthogonalised `source` be added to `target`, or put there."""
        if source.shape[0] > source.shape[1]:
            source, target = source.mT, target.mT
        self._items[tuple(source.shape)].append((source, target, factor))

    def run(self, table: tuple[tuple[float, float, float], ...], dtype: torch.dtype) -> None:
        for (rows, columns), items in self._items.items():
            count = max(1, BATCH_ELEMENTS // (rows * columns))
            for start in range(0, len(items), count):
                batch = items[start : start + count]
                matrices = batch[0][0].new_empty(len(batch), rows, columns, dtype=dtype)
                for matrix, (source, _, _) in zip(matrices, batch, strict=True):
                    matrix.copy_(source)
                for matrix, (_, target, factor) in zip(orthogonalize(matrices, table), batch, strict=True):
                    _put(target, matrix, factor, self.overwrite)


def _put(target: torch.Tensor, matrix: torch.Tensor, factor: float, overwrite: bool) -> None:
    if not overwrite:
        target.add_(matrix, alpha=factor)
    elif factor == 1:
        target.copy_(matrix)
    else:
        target.copy_(matrix).mul_(factor)


STATE_KINDS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
"""What an algorithm remembers for each element, by the names that torch gives it."""


def initial_state(algorithm: str, masters: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's optimizer state before the first step."""
    state = {kind: torch.zeros_like(masters, requires_grad=False) for kind in STATE_KINDS[algorithm]}
    return state | ({"step": torch.zeros((), device=masters.device)} if algorithm == "adamw" else {})
