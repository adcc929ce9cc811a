"""Which rank orthogonalises which matrix, when each holds a slice of them that ends where it ends.

ZeRO-1 lays a group's parameters end to end, pads, and gives each rank an equal slice. Most parameters lie inside one slice,
and their rank has all it needs. Those that lie across a boundary are sent together to one of the ranks that hold a part,
and their updates are sent back: at most one parameter for each of the N - 1 boundaries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

Exchange = Callable[[list[torch.Tensor], list[int]], list[torch.Tensor]]
"""Sends a flat tensor to each rank and gives what each rank sent, of which the sizes are known. Every rank must call."""


@dataclass(frozen=True)
class BlockMatrix:
    """A parameter of a transformer block, as Conv1D stores it: [inputs, parts x outputs]."""

    name: str
    inputs: int
    outputs: int
    parts: int = 1
    """Matrices side by side: 3 in c_attn, which holds those of queries, keys and values."""

    @property
    def numel(self) -> int:
        return self.inputs * self.outputs * self.parts

    @property
    def neurons(self) -> int:
        """Outputs of all its matrices."""
        return self.parts * self.outputs

    @property
    def cost(self) -> int:
        """Multiplications of one iteration of Newton-Schulz: XX^T, its square, and its product with X."""
        short, long = sorted((self.inputs, self.outputs))
        return self.parts * (2 * short * short * long + short**3)

    @property
    def scale(self) -> float:
        """Factor of the update: max(1, outputs / inputs)^0.5, Keller Jordan's rule for matrices stored (out, in)."""
        return max(1.0, self.outputs / self.inputs) ** 0.5

    def split(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The matrices of the flat parameter, views [inputs, outputs]."""
        return flat.view(self.inputs, self.parts * self.outputs).split(self.outputs, dim=1)


@dataclass(frozen=True)
class Piece:
    """What a rank's slice holds of a parameter."""

    rank: int
    start: int
    """First element of the parameter."""
    stop: int
    offset: int
    """Where it begins in the rank's slice."""

    @property
    def size(self) -> int:
        return self.stop - self.start

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Its part of the rank's slice."""
        return flat[self.offset : self.offset + self.size]


class Sharing:
    """The owner and the pieces of each parameter; the same on every rank.

    Args:
        matrices: the parameters in the order in which they lie.
        slice_size: elements of a rank's slice; the slices together may be longer than the parameters.
    """

    def __init__(self, matrices: Sequence[BlockMatrix], slice_size: int, num_ranks: int):
        self.num_ranks = num_ranks
        self.pieces: list[list[Piece]] = []
        begin = 0
        for matrix in matrices:
            end = begin + matrix.numel
            self.pieces.append(
                [
                    Piece(rank, max(begin, rank * slice_size) - begin, min(end, (rank + 1) * slice_size) - begin,
                          max(begin, rank * slice_size) - rank * slice_size)
                    for rank in range(begin // slice_size, (end - 1) // slice_size + 1)
                ]
            )  # fmt: skip
            begin = end
        if begin > slice_size * num_ranks:
            raise ValueError(f"{num_ranks} slices of {slice_size} elements do not hold {begin}")
        self.owners = self._choose_owners(matrices)
        self.split = [index for index, pieces in enumerate(self.pieces) if len(pieces) > 1]
        """Parameters that lie across a boundary."""
        self._lent: dict[tuple[int, int], list[tuple[int, Piece]]] = defaultdict(list)
        """By rank and owner, the pieces in the rank's slice of matrices that are another's."""
        for index in self.split:
            for piece in self.pieces[index]:
                if piece.rank != self.owners[index]:
                    self._lent[piece.rank, self.owners[index]].append((index, piece))

    def _choose_owners(self, matrices: Sequence[BlockMatrix]) -> list[int]:
        owners = [pieces[0].rank for pieces in self.pieces]
        load = [0] * self.num_ranks
        for pieces, matrix in zip(self.pieces, matrices, strict=True):
            if len(pieces) == 1:
                load[pieces[0].rank] += matrix.cost
        for index, pieces in enumerate(self.pieces):
            if len(pieces) > 1:
                # The one with the least to do; of equals the one with the most of it, which then need not be sent.
                owners[index] = min(pieces, key=lambda piece: (load[piece.rank], -piece.size, piece.rank)).rank
                load[owners[index]] += matrices[index].cost
        return owners

    def whole(self, rank: int) -> list[tuple[int, Piece]]:
        """The parameters that lie in the rank's slice from end to end."""
        return [(i, pieces[0]) for i, pieces in enumerate(self.pieces) if len(pieces) == 1 and pieces[0].rank == rank]

    def owned(self, rank: int) -> list[int]:
        """The parameters of which the rank orthogonalises the matrices."""
        return [index for index, owner in enumerate(self.owners) if owner == rank]

    def own_pieces(self, rank: int) -> list[tuple[int, Piece]]:
        """The rank's pieces of parameters that lie across a boundary."""
        return [(i, piece) for i in self.split for piece in self.pieces[i] if piece.rank == rank]

    def collect(self, rank: int, flat: torch.Tensor, dtype: torch.dtype, exchange: Exchange) -> dict[int, torch.Tensor]:
        """Bring the pieces of split parameters to their owners.

        Args:
            flat: the rank's slice.
            dtype: what they are sent in; if it is the owner's precision nothing is lost that would not be later.
        Returns:
            by index, the whole flat parameters that this rank owns.
        """
        outgoing = [[piece.of(flat).to(dtype) for _, piece in self._lent[rank, other]] for other in range(self.num_ranks)]
        parts = {(i, rank): piece.of(flat).to(dtype) for i, piece in self.own_pieces(rank) if self.owners[i] == rank}
        incoming = [self._lent[other, rank] for other in range(self.num_ranks)]
        parts |= _exchange_parts(outgoing, incoming, flat.new_empty(0, dtype=dtype), exchange)
        return {i: torch.cat([parts[i, p.rank] for p in self.pieces[i]]) for i in self.split if self.owners[i] == rank}

    def hand_back(
        self, rank: int, wholes: dict[int, torch.Tensor], like: torch.Tensor, exchange: Exchange
    ) -> list[tuple[int, Piece, torch.Tensor]]:
        """The way back.

        Args:
            wholes: by index, a flat tensor of the size of each split parameter that this rank owns.
            like: a tensor of their precision and device.
        Returns:
            each of this rank's pieces with the index of its parameter and its part of what the owner computed.
        """
        outgoing = [
            [wholes[i][piece.start : piece.stop] for i, piece in self._lent[other, rank]] for other in range(self.num_ranks)
        ]
        incoming = [self._lent[rank, other] for other in range(self.num_ranks)]
        parts = _exchange_parts(outgoing, incoming, like, exchange)
        return [
            (i, piece, wholes[i][piece.start : piece.stop] if self.owners[i] == rank else parts[i, rank])
            for i, piece in self.own_pieces(rank)
        ]


def _exchange_parts(
    outgoing: list[list[torch.Tensor]], incoming: list[list[tuple[int, Piece]]], like: torch.Tensor, exchange: Exchange
) -> dict[tuple[int, int], torch.Tensor]:
    """Send tensors to each rank; what comes, by parameter and by the rank whose slice it is of."""
    sent = [torch.cat(parts) if parts else like.new_empty(0) for parts in outgoing]
    received = exchange(sent, [sum(piece.size for _, piece in pieces) for pieces in incoming])
    parts = {}
    for pieces, flat in zip(incoming, received, strict=True):
        for (i, piece), part in zip(pieces, flat.split([piece.size for _, piece in pieces]), strict=True):
            parts[i, piece.rank] = part
    return parts


def all_to_all(sent: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    """The exchange over the ranks of the run; NCCL and gloo skip pairs with nothing to tell."""
    received = sent[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(sent), sizes, [tensor.numel() for tensor in sent])
    return list(received.split(sizes))
