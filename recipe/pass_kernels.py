"""The Triton kernels of recipe/passes.py, apart because Triton comes with the GPU builds of torch alone."""

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(
    x, branch, weight, shift, total, normed, means, rstds, tokens, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program ROWS rows: x + branch, and its LayerNorm, with what the backward needs of it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    valid = (rows < tokens)[:, None] & inside[None, :]
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    added = tl.load(x + places, mask=valid, other=0.0).to(tl.float32) + tl.load(branch + places, mask=valid, other=0.0).to(
        tl.float32
    )
    # Normalised is what the next block adds to and the backward reads: the sum as it is kept.
    kept = added.to(total.dtype.element_ty)
    tl.store(total + places, kept, mask=valid)
    added = kept.to(tl.float32)
    mean = tl.sum(added, axis=1) / width
    centred = tl.where(inside[None, :], added - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    tl.store(means + rows, mean, mask=rows < tokens)
    tl.store(rstds + rows, rstd, mask=rows < tokens)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    offset = tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + places, (centred * rstd[:, None] * scale + offset).to(normed.dtype.element_ty), mask=valid)


@triton.jit
def add_norm_backward_kernel(
    grad_total, grad_normed, total, means, rstds, weight, grad, sums, tokens, width,
    HAS_TOTAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes ROWS rows at a time, as many as there are programs further on each time: their gradient through the
    LayerNorm, plus the one that comes past it. It keeps, fp32 [3, width] a program, its sums over the rows for the gradients
    of LayerNorm's weight and bias and of the bias that was added."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_shift = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < tokens)[:, None] & inside[None, :]
        places = rows.to(tl.int64)[:, None] * width + columns[None, :]
        upstream = tl.load(grad_normed + places, mask=valid, other=0.0).to(tl.float32)
        x = tl.load(total + places, mask=valid, other=0.0).to(tl.float32)
        mean = tl.load(means + rows, mask=rows < tokens, other=0.0)[:, None]
        rstd = tl.load(rstds + rows, mask=rows < tokens, other=0.0)[:, None]
        standard = (x - mean) * rstd
        scaled = upstream * scale
        along_mean = tl.sum(scaled, axis=1)[:, None] / width
        along_standard = tl.sum(scaled * standard, axis=1)[:, None] / width
        g = (scaled - along_mean - standard * along_standard) * rstd
        if HAS_TOTAL:
            g += tl.load(grad_total + places, mask=valid, other=0.0).to(tl.float32)
        tl.store(grad + places, g.to(grad.dtype.element_ty), mask=valid)
        # Rows past the end count as 0: their rstd is.
        of_weight += tl.sum(upstream * standard, axis=0)
        of_shift += tl.sum(upstream, axis=0)
        of_bias += tl.sum(g, axis=0)
    sums += tl.program_id(0) * 3 * width + columns
    tl.store(sums, of_weight, mask=inside)
    tl.store(sums + width, of_shift, mask=inside)
    tl.store(sums + 2 * width, of_bias, mask=inside)


@triton.jit
def join_kernel(first, second, third, joined, sums, tokens, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Programs [n, 3]: one of three matrices [tokens, width] each, ROWS rows at a time, into its third of `joined`, with its
    sums over the rows, fp32 [n, 3 width]."""
    part = tl.program_id(1)
    source = first
    if part == 1:
        source = second
    if part == 2:
        source = third
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        valid = (rows < tokens)[:, None] & inside[None, :]
        row = rows.to(tl.int64)[:, None]
        values = tl.load(source + row * width + columns[None, :], mask=valid, other=0.0)
        tl.store(joined + row * (3 * width) + part * width + columns[None, :], values, mask=valid)
        total += values.to(tl.float32)
    sums += tl.program_id(0) * 3 * width + part * width + columns
    tl.store(sums, tl.sum(total, axis=0), mask=inside)
