"""Muon for the matrices of the blocks, AdamW for the rest, in one optimizer whose Muon part is shared out among the ranks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch

from recipe.optim.cautious import CautiousAdamW, chunks, decay_where_agreeing
from recipe.optim.orthogonalize import orthogonalize
from recipe.optim.sharing import BlockMatrix, Exchange, Sharing, all_to_all

BATCH_ELEMENTS = 2**26
"""Elements of matrices that are orthogonalised at a time, which bounds the memory: 128 MiB in bf16 and a few times that for
what the products need. The 124M model's are one batch of each shape."""

NORMUON_BETA2 = 0.95
NORMUON_EPSILON = 1e-10
"""As in the paper and its code."""

SECOND_MOMENTS = "second_momentum_buffer"
"""What NorMuon remembers for each neuron, by the name that its authors gave it."""


class MuonAdamW(CautiousAdamW):
    """CautiousAdamW in groups with `algorithm` "adamw", Muon (Keller Jordan 2024) in those with "muon", NorMuon (Li et al.
    2025, arXiv:2510.05491) in those with "normuon".

    A group for Muon has one parameter: this rank's slice of the flat parameters that `matrices`, a list of BlockMatrix,
    describes in their order, as ZeRO-1 makes it. Further keys: `lr`, `momentum`, `weight_decay`. Momentum is element-wise and
    stays with the slice (`momentum_buffer`); each matrix is orthogonalised on one rank.

        m <- momentum m + (1 - momentum) g
        W <- (1 - lr weight_decay) W - lr scale orthogonalize((1 - momentum) g + momentum m)

    NorMuon divides the rows o of the orthogonalised matrix O (out, in) by their running root mean square and brings O back to
    its Frobenius norm. The second moments v, one a row, lie with the matrix's owner (`second_momentum_buffer`).

        v <- beta2 v + (1 - beta2) mean(o^2)
        o <- o / sqrt(v) |O| / |O / sqrt(v)|

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
            if group["algorithm"] != "adamw":
                self._muon_step(group)

    def _muon_step(self, group: dict) -> None:
        (weights,) = group["params"]
        direction = self._direction(weights, group)
        sharing = self._sharing(group)
        moments = self._second_moments(group)
        matrices: list[BlockMatrix] = group["matrices"]
        if group["weight_decay"]:
            weights.mul_(1 - group["lr"] * group["weight_decay"] * self.keep)
        cautious = bool(group.get("cautious_decay"))
        # Whether to decay shows only in the whole update, which then takes the direction's place before it is applied.
        flat, rate = (direction, 1.0) if cautious else (weights, -group["lr"])
        work = _Batches(overwrite=cautious)

        def share(index: int, source: torch.Tensor, target: torch.Tensor, factor: float) -> None:
            matrix = matrices[index]
            neurons = moments[index].split(matrix.outputs) if moments else [None] * matrix.parts
            for one in zip(matrix.split(source), matrix.split(target), neurons, strict=True):
                work.add(*one, factor)

        for index, piece in sharing.whole(self.rank):
            share(index, piece.of(direction), piece.of(flat), rate * matrices[index].scale)
        updates = {}
        if sharing.split:
            wholes = sharing.collect(self.rank, direction, self.ns_dtype, self.exchange)
            for index, whole in wholes.items():
                updates[index] = torch.zeros_like(whole)
                share(index, whole, updates[index], 1.0)
        work.run(self.table, self.ns_dtype, (1 - NORMUON_BETA2) * self.keep)
        if sharing.split:
            like = direction.new_empty(0, dtype=self.ns_dtype)
            for index, piece, update in sharing.hand_back(self.rank, updates, like, self.exchange):
                _put(piece.of(flat), update, rate * matrices[index].scale, overwrite=cautious)
        if cautious:
            for w, update in chunks(weights, direction):
                decay_where_agreeing(w, w * update, group["lr"] * group["cautious_decay"], self.keep)
                w.sub_(update, alpha=group["lr"])

    def _sharing(self, group: dict) -> Sharing:
        if "sharing" not in group:
            # Only now: ZeRO-1 puts the slice into the group after the optimizer was made.
            group["sharing"] = Sharing(group["matrices"], group["params"][0].numel(), self.num_ranks)
        return group["sharing"]

    def _second_moments(self, group: dict) -> dict[int, torch.Tensor]:
        """NorMuon's state of the parameters that this rank owns, by index: fp32 [parts x outputs]."""
        if group["algorithm"] != "normuon":
            return {}
        (weights,) = group["params"]
        owned = self._sharing(group).owned(self.rank)
        sizes = [group["matrices"][index].neurons for index in owned]
        if SECOND_MOMENTS not in self.state[weights]:
            self.state[weights][SECOND_MOMENTS] = torch.zeros(sum(sizes), device=weights.device)
        return dict(zip(owned, self.state[weights][SECOND_MOMENTS].split(sizes), strict=True))

    def second_moments(self, group: dict) -> torch.Tensor:
        """NorMuon's state of all parameters of a group, in their order, with zeros where another rank owns them."""
        owned = self._second_moments(group)
        like = self.state[group["params"][0]][SECOND_MOMENTS]
        return torch.cat([owned.get(i, like.new_zeros(matrix.neurons)) for i, matrix in enumerate(group["matrices"])])

    def load_second_moments(self, group: dict, values: torch.Tensor) -> None:
        """Take over what this rank owns of `values`, the state of all parameters of a group in their order."""
        whole = values.split([matrix.neurons for matrix in group["matrices"]])
        for index, moments in self._second_moments(group).items():
            moments.copy_(whole[index])

    def _direction(self, weights: torch.Tensor, group: dict) -> torch.Tensor:
        """The momentum after this step's gradient, Nesterov's look ahead included, in the place of the gradient; zero if
        nothing may change."""
        gradient, momentum = weights.grad, group["momentum"]
        state = self.state[weights]
        if "momentum_buffer" not in state:
            state |= initial_state(group["algorithm"], weights)
        keep, found_inf = self.keep, getattr(self, "found_inf", None)
        if found_inf is not None:
            gradient.masked_fill_(found_inf.bool(), 0)  # 0 x NaN would be NaN
        state["momentum_buffer"].lerp_(gradient, (1 - momentum) * keep)
        return gradient.lerp_(state["momentum_buffer"], momentum * keep)


class _Item(NamedTuple):
    """A matrix to orthogonalise, with no more rows than columns."""

    source: torch.Tensor
    target: torch.Tensor
    moments: torch.Tensor | None
    """Second moments of its neurons under NorMuon, [outputs]."""
    neuron_dim: int
    """-2 if its rows are the neurons, -1 if its columns are."""
    factor: float


class _Batches:
    """Matrices to orthogonalise, collected by shape.

    Args:
        overwrite: put the results in the place of their targets, which may be their sources, instead of adding them.
    """

    def __init__(self, overwrite: bool = False):
        self.overwrite = overwrite
        self._items: dict[tuple[int, int], list[_Item]] = defaultdict(list)

    def add(self, source: torch.Tensor, target: torch.Tensor, moments: torch.Tensor | None, factor: float) -> None:
        """Let `factor` times the orthogonalised `source` [inputs, outputs] be added to `target`, or put there."""
        neuron_dim = -1
        if source.shape[0] > source.shape[1]:
            source, target, neuron_dim = source.mT, target.mT, -2
        self._items[tuple(source.shape)].append(_Item(source, target, moments, neuron_dim, factor))

    def run(self, table: tuple[tuple[float, float, float], ...], dtype: torch.dtype, weight: torch.Tensor | float) -> None:
        """Orthogonalise them in precision `dtype`; `weight` is that of this step in second moments."""
        for (rows, columns), items in self._items.items():
            count = max(1, BATCH_ELEMENTS // (rows * columns))
            if items[0].moments is not None:
                items.sort(key=lambda item: item.neuron_dim)  # what is normalised alike lies together
            for start in range(0, len(items), count):
                batch = items[start : start + count]
                matrices = batch[0].source.new_empty(len(batch), rows, columns, dtype=dtype)
                for matrix, item in zip(matrices, batch, strict=True):
                    matrix.copy_(item.source)
                found = orthogonalize(matrices, table)
                if batch[0].moments is not None:
                    self._put_normalized(found, batch, weight)
                    continue
                for matrix, item in zip(found, batch, strict=True):
                    _put(item.target, matrix, item.factor, self.overwrite)

    def _put_normalized(self, matrices: torch.Tensor, batch: list[_Item], weight: torch.Tensor | float) -> None:
        for neuron_dim in (-2, -1):
            items = [item for item in batch if item.neuron_dim == neuron_dim]
            if not items:
                continue
            part, matrices = matrices[: len(items)], matrices[len(items) :]
            scales = normalize_neurons(part, [item.moments for item in items], neuron_dim, weight)
            for matrix, scale, item in zip(part, scales, items, strict=True):
                if self.overwrite:
                    torch.mul(matrix, scale * item.factor, out=item.target)
                else:
                    item.target.addcmul_(matrix, scale, value=item.factor)


def normalize_neurons(
    matrices: torch.Tensor, moments: list[torch.Tensor], neuron_dim: int, weight: torch.Tensor | float
) -> torch.Tensor:
    """NorMuon's factor of each neuron's update, after its second moment has taken in this one.

    Args:
        matrices: orthogonalised, [batch, rows, columns].
        moments: of each matrix, fp32 [neurons]; updated.
        neuron_dim: -2 if the rows are the neurons, -1 if the columns are.
        weight: of this step in the moments.
    Returns:
        fp32 [batch, neurons, 1] or [batch, 1, neurons].
    """
    along = -3 - neuron_dim
    squares = torch.linalg.vector_norm(matrices, dim=along, dtype=torch.float32).square_()
    averages = torch.stack(moments)
    averages.lerp_(squares / matrices.shape[along], weight)
    torch._foreach_copy_(moments, list(averages))
    scales = averages.sqrt_().add_(NORMUON_EPSILON).reciprocal_()
    lengths = squares.sum(1, keepdim=True).sqrt()
    scaled_lengths = squares.mul_(scales.square()).sum(1, keepdim=True).sqrt()
    return scales.mul_(lengths / (scaled_lengths + NORMUON_EPSILON)).unsqueeze(along)


def _put(target: torch.Tensor, matrix: torch.Tensor, factor: float, overwrite: bool) -> None:
    if not overwrite:
        target.add_(matrix, alpha=factor)
    elif factor == 1:
        target.copy_(matrix)
    else:
        target.copy_(matrix).mul_(factor)


ELEMENT_STATE = {
    "adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",), "normuon": ("momentum_buffer",),
}  # fmt: skip
"""What an algorithm remembers for each element, by the names that torch gives it."""


def initial_state(algorithm: str, masters: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's optimizer state before the first step."""
    state = {kind: torch.zeros_like(masters, requires_grad=False) for kind in ELEMENT_STATE[algorithm]}
    return state | ({"step": torch.zeros((), device=masters.device)} if algorithm == "adamw" else {})
