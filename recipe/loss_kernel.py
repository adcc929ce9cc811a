"""The Triton kernels of recipe/loss.py, apart because Triton comes with the GPU builds of torch alone."""

import triton
import triton.language as tl


@triton.jit
def cross_entropy_kernel(
    logits, losses, targets, stride, vocab_size, width, GRADIENT: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row: its loss and, in place of its logits, softmax - onehot and, for Z_LOSS * log_sum^2, 2 Z_LOSS log_sum
    softmax. Columns from vocab_size to width are padding: outside the softmax, and 0 in the gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    # Read before any warp can have overwritten it: the reductions below are barriers.
    target_logit = tl.load(logits + target).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    largest = -1.0e30
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < vocab_size, other=-float("inf")).to(tl.float32)
        # One maximum for the block, not one a lane: an exponential less for each element.
        new = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - new) + tl.exp(x - new)
        largest = new
    log_sum = largest + tl.log(tl.sum(total, axis=0))
    tl.store(losses + row, log_sum - target_logit)
    if GRADIENT:
        # Backwards: what was read last is still in the L2 cache.
        blocks = tl.cdiv(width, BLOCK)
        for i in range(blocks):
            column = (blocks - 1 - i) * BLOCK + columns
            x = tl.load(logits + column, mask=column < vocab_size, other=-float("inf"), eviction_policy="evict_first").to(
                tl.float32
            )
            probability = tl.exp(x - log_sum)
            if Z_LOSS > 0:
                probability *= 1.0 + 2.0 * Z_LOSS * log_sum
            gradient = tl.where(column == target, probability - 1.0, probability)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < width, eviction_policy="evict_first")


@triton.jit
def fp8_gradient_kernel(
    logits, losses, targets, gradient, transposed, tokens, vocab_size, width, SCALE: tl.constexpr, Z_LOSS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a tile: SCALE times the gradient above, of logits [tokens, width], in fp8 (e5m2), and its transpose, of which
    an element is four tokens in an int32, [width, tokens / 4]. fp8 products on Hopper want both factors with the summed
    dimension contiguous, and the two gradients sum over different ones."""
    first_row, columns = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # Of each four rows the first, the second and so on: a word of the transpose is then one lane's.
    x0 = _load_rows(logits, first_row, columns, tokens, vocab_size, width, ROWS)
    x1 = _load_rows(logits, first_row + 1, columns, tokens, vocab_size, width, ROWS)
    x2 = _load_rows(logits, first_row + 2, columns, tokens, vocab_size, width, ROWS)
    x3 = _load_rows(logits, first_row + 3, columns, tokens, vocab_size, width, ROWS)
    g0 = _gradient(x0, logits, losses, targets, gradient, first_row, columns, tokens, width, SCALE, Z_LOSS, ROWS)
    g1 = _gradient(x1, logits, losses, targets, gradient, first_row + 1, columns, tokens, width, SCALE, Z_LOSS, ROWS)
    g2 = _gradient(x2, logits, losses, targets, gradient, first_row + 2, columns, tokens, width, SCALE, Z_LOSS, ROWS)
    g3 = _gradient(x3, logits, losses, targets, gradient, first_row + 3, columns, tokens, width, SCALE, Z_LOSS, ROWS)
    # Not by shifting bytes: Triton 3.6 takes the byte beside it along when it widens one of fp8 (seen in its PTX).
    word = tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e5m2x2.f32 low, $2, $1; cvt.rn.satfinite.e5m2x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f", [g0, g1, g2, g3], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    words = first_row // 4 + tl.arange(0, ROWS // 4)
    across = columns.to(tl.int64)[:, None] * (tokens // 4) + words[None, :]
    tl.store(transposed + across, tl.trans(word), mask=(columns < width)[:, None] & (words < tokens // 4)[None, :])


@triton.jit
def _load_rows(logits, first_row, columns, tokens, vocab_size, width, ROWS: tl.constexpr):
    rows = first_row + 4 * tl.arange(0, ROWS // 4)
    valid = (rows < tokens)[:, None] & (columns < vocab_size)[None, :]
    return tl.load(logits + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=valid, other=-float("inf"))


@triton.jit
def _gradient(
    x, logits, losses, targets, gradient, first_row, columns, tokens, width, SCALE: tl.constexpr, Z_LOSS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The scaled gradient of every fourth row from first_row on, in fp32; stored in fp8."""
    rows = first_row + 4 * tl.arange(0, ROWS // 4)
    inside = rows < tokens
    row_start = rows.to(tl.int64) * width
    target = tl.load(targets + rows, mask=inside, other=0)
    log_sum = tl.load(losses + rows, mask=inside, other=0.0) + tl.load(logits + row_start + target, mask=inside, other=0.0).to(
        tl.float32
    )
    probability = tl.exp(x.to(tl.float32) - log_sum[:, None])
    if Z_LOSS > 0:
        probability *= 1.0 + 2.0 * Z_LOSS * log_sum[:, None]
    g = tl.where(columns[None, :] == target[:, None], probability - 1.0, probability) * SCALE
    valid = inside[:, None] & (columns < width)[None, :]
    tl.store(gradient + row_start[:, None] + columns[None, :], g.to(gradient.dtype.element_ty), mask=valid)
    return g


@triton.jit
def fp8_quantize_kernel(
    x, scale, out, transposed, rows, width, DIRECT: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a tile: x [rows, width] * scale in fp8 (e4m3), as it lies, transposed, or both."""
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = (row < rows)[:, None] & (column < width)[None, :]
    offsets = row.to(tl.int64)[:, None] * width + column[None, :]
    value = (tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32) * tl.load(scale)).to(tl.float8e4nv)
    if DIRECT:
        tl.store(out + offsets, value, mask=valid)
    if TRANSPOSED:
        tl.store(transposed + column.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(value), mask=tl.trans(valid))
