"""The Triton kernel of recipe/block.py, apart because Triton comes with the GPU builds of torch alone."""

import triton
import triton.language as tl


@triton.jit
def join_kernel(q, k, v, out, sums, rows, width, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """One program a stripe of ROWS rows by COLUMNS columns: out [rows, 3 width] = q, k, v [rows, width] side by side, and
    the stripe's column sums in fp32, sums [stripes, 3 width]. Programs of axis 2 take q, k and v."""
    part = tl.program_id(2)
    source = q
    if part == 1:
        source = k
    if part == 2:
        source = v
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * ROWS
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, ROWS, STEP):
        row = first + start + tl.arange(0, STEP)
        valid = (row < rows)[:, None] & (columns < width)[None, :]
        offset = row.to(tl.int64)[:, None]
        x = tl.load(source + offset * width + columns[None, :], mask=valid, other=0.0)
        tl.store(out + offset * (3 * width) + part * width + columns[None, :], x, mask=valid)
        total += tl.sum(x.to(tl.float32), axis=0)
    tl.store(sums + tl.program_id(1) * (3 * width) + part * width + columns, total, mask=columns < width)
