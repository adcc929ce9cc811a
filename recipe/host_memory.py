"""Memory on the host for what is copied off the device again and again."""

from __future__ import annotations

import math

import torch

BLOCK = 1 << 27
"""Numbers of 4 bytes, 512 MiB."""
ALIGNMENT = 64


class HostMemory:
    """fp32 tensors by name, the same each time, side by side in blocks.

    Page-locked memory is filled at 25 GB/s or more, other memory at 3 or so; but each piece of it is rounded up to a power of
    two: tensor by tensor 1558M's masters and moments would take 28 GB instead of 19.

    Args:
        pinned: page-locked, which takes a GPU.
    """

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._blocks: list[torch.Tensor] = []
        self._used: list[int] = []
        self._tensors: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The tensor of a name, whose content is that of its last use; at its first the shape counts."""
        if name not in self._tensors:
            count = math.prod(shape)
            self._tensors[name] = self._take(count).view(shape)
        return self._tensors[name]

    def _take(self, count: int) -> torch.Tensor:
        room = -(-count // ALIGNMENT) * ALIGNMENT
        place = next((n for n, block in enumerate(self._blocks) if len(block) - self._used[n] >= room), None)
        if place is None:
            place = len(self._blocks)
            self._blocks.append(torch.empty(max(BLOCK, room), dtype=torch.float32, pin_memory=self._pinned))
            self._used.append(0)
        begin = self._used[place]
        self._used[place] += room
        return self._blocks[place][begin : begin + count]
