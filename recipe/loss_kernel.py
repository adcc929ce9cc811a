"""The Triton kernel of recipe/loss.py, apart because Triton comes with the GPU builds of torch alone."""

import triton
import triton.language as tl


@triton.jit
def cross_entropy_kernel(logits, losses, targets, stride, vocab_size, width, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: its loss and, in place of its logits, softmax - onehot. Columns from vocab_size to width are padding:
    outside the softmax, and 0 in the gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    # Read before any warp can have overwritten it: the reductions below are barriers.
    target_logit = tl.load(logits + target).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + columns < vocab_size
        x = tl.load(logits + start + columns, mask=inside, other=-1.0e30).to(tl.float32)
        new = tl.maximum(largest, x)
        total = total * tl.exp(largest - new) + tl.where(inside, tl.exp(x - new), 0.0)
        largest = new
    top = tl.max(largest, axis=0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    tl.store(losses + row, log_sum - target_logit)
    if GRADIENT:
        # The row, 100 KB for GPT-2's vocabulary, is still in the L2 cache.
        for start in range(0, width, BLOCK):
            column = start + columns
            x = tl.load(logits + column, mask=column < vocab_size, other=-1.0e30).to(tl.float32)
            probability = tl.exp(x - log_sum)
            gradient = tl.where(column == target, probability - 1.0, probability)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < width)
