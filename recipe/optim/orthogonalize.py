"""The nearest orthogonal matrix by an odd polynomial that is applied a few times: Newton-Schulz, batched."""

from __future__ import annotations

import torch

EPSILON = 1e-7
"""Added to the Frobenius norm, so that a zero matrix stays zero (Keller Jordan's Muon)."""

QUINTIC = ((3.4445, -4.7750, 2.0315),)
"""Keller Jordan's coefficients (kellerjordan.github.io/posts/muon): steepest at zero, which takes singular values to about
0.7 to 1.2 rather than to 1."""

_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_SAFETY = 1.01
"""Every polynomial but the last reads its argument as this much smaller: rounding in bf16 must not leave the interval that
the next one is made for."""

POLAR_EXPRESS = (
    *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS),
    (1.875, -1.25, 0.375),
)
"""The best polynomial for each iteration in turn, for singular values from 1e-3 to 1 (Amsel et al. 2025, The Polar Express)."""

POLYNOMIALS = {"quintic": QUINTIC, "polar_express": POLAR_EXPRESS}
"""By the value of `muon_polynomial`, coefficients (a, b, c) of ax + bx^3 + cx^5 by iteration; the last goes on."""


def coefficients(polynomial: str, steps: int) -> tuple[tuple[float, float, float], ...]:
    """The coefficients of `steps` iterations."""
    table = POLYNOMIALS[polynomial]
    return tuple(table[min(step, len(table) - 1)] for step in range(steps))


def orthogonalize(matrices: torch.Tensor, table: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
    """U V^T of each matrix's singular value decomposition U S V^T, approximately.

    Args:
        matrices: [batch, rows, columns] in the precision to compute in; overwritten. Fastest with rows <= columns.
        table: coefficients (a, b, c) by iteration.
    Returns:
        [batch, rows, columns] of the same precision.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT, table).mT
    # No singular value is above the Frobenius norm.
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = matrices.div_(norms + EPSILON)
    for a, b, c in table:
        gram = x @ x.mT
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, inner, x, beta=a)
    return x
