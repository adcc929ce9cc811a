"""Cautious weight decay (Chen et al. 2025, arXiv:2510.12402): only where the update shrinks the weight as well.

    W <- W - lr (u + weight_decay [u W >= 0] W)

The brackets are 1 or 0, element by element, by the weights from before the update. All of it stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK_ELEMENTS = 2**26
"""Elements that are looked at together, which bounds the memory that takes: 256 MiB."""


class CautiousAdamW(torch.optim.AdamW):
    """torch.optim.AdamW; in groups with a `cautious_decay`, which stands in for `weight_decay`, the decay is cautious.

    As under fused AdamW, where the tensor `found_inf` is 1 nothing changes. Parameters must be contiguous.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group.get("cautious_decay"):
                for weights in group["params"]:
                    self._decay(weights, group)
        super().step()

    def _decay(self, weights: torch.Tensor, group: dict) -> None:
        # Of AdamW's update, m / (sqrt(v) + epsilon), only the sign is asked for: that of the first moment m after this step.
        moment = self.state[weights].get("exp_avg")
        moment = torch.zeros_like(weights) if moment is None else moment
        for w, m, gradient in chunks(weights, moment, weights.grad):
            product = m.lerp(gradient, 1 - group["betas"][0]).mul_(w)
            decay_where_agreeing(w, product, group["lr"] * group["cautious_decay"], self.keep)

    @property
    def keep(self) -> torch.Tensor | float:
        """1, or where the gradient is not finite 0."""
        found_inf = getattr(self, "found_inf", None)
        return 1.0 if found_inf is None else 1 - found_inf


def decay_where_agreeing(weights: torch.Tensor, product: torch.Tensor, rate: float, keep: torch.Tensor | float) -> None:
    """Shrink `weights` by `rate` where they have the sign of the update, which is to be subtracted, or either is zero.

    Args:
        product: of weights and update; overwritten.
        keep: 1, or 0 if nothing may change.
    """
    agree = product.ge_(0).mul_(keep)  # NaN does not agree
    weights.addcmul_(weights, agree, value=-rate)


def chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of equal parts of tensors of the same size."""
    return zip(*(tensor.view(-1).split(CHUNK_ELEMENTS) for tensor in tensors), strict=True)
