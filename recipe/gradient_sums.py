"""The gradients of a backward, added to fp32 sums."""

from __future__ import annotations

from collections.abc import Iterable

import torch

BLOCK = 4096
"""Elements that a program of the kernel adds."""
ALIGNMENT = 16
"""Bytes that a thread reads at once."""


class GradientSums:
    """Adds the bf16 gradients of some parameters to their fp32 sums and drops them: with Triton in one kernel for all of
    them, where torch takes one or two for each, which last longer and leave gaps between them (docs/results.md).

    Args:
        pairs: each parameter that a backward gives a gradient, and a contiguous fp32 tensor of its size.
        triton: whether to use it.
    """

    def __init__(self, pairs: Iterable[tuple[torch.nn.Parameter, torch.Tensor]], triton: bool):
        self._parameters, self._sums = zip(*pairs, strict=True)
        self._kernel = None
        if triton and all(total.data_ptr() % ALIGNMENT == 0 for total in self._sums):
            from recipe.gradient_kernel import add_kernel

            device = self._sums[0].device
            self._kernel = add_kernel
            blocks = [(i, start) for i, total in enumerate(self._sums) for start in range(0, total.numel(), BLOCK)]
            self._blocks = torch.tensor(blocks, dtype=torch.int32, device=device)
            self._sizes = torch.tensor([total.numel() for total in self._sums], dtype=torch.int32, device=device)
            self._totals = torch.tensor([total.data_ptr() for total in self._sums], dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients of the backward that has just been, every parameter's."""
        gradients = [p.grad for p in self._parameters]
        addresses = [gradient.data_ptr() for gradient in gradients]
        plain = all(g.is_contiguous() and a % ALIGNMENT == 0 for g, a in zip(gradients, addresses, strict=True))
        if self._kernel is None or not plain:
            torch._foreach_add_(self._sums, [g.view_as(total) for g, total in zip(gradients, self._sums, strict=True)])
        else:
            # From page-locked memory, and so without waiting.
            table = torch.tensor(addresses, dtype=torch.int64).pin_memory().to(self._totals.device, non_blocking=True)
            self._kernel[(len(self._blocks),)](self._blocks, self._sizes, table, self._totals, BLOCK=BLOCK, num_warps=4)
        for p in self._parameters:
            p.grad = None
