"""The Triton kernel of recipe/gradient_sums.py, apart because Triton comes with the GPU builds of torch alone."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(blocks, sizes, gradients, totals, BLOCK: tl.constexpr):
    """One program a block of one parameter: its fp32 sum += its bf16 gradient.

    `blocks`: [programs, 2] int32, parameter and first element; `sizes`: elements by parameter; `gradients` and `totals`:
    addresses by parameter, multiples of 16 bytes.
    """
    parameter = tl.load(blocks + 2 * tl.program_id(0))
    element = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    valid = element < tl.load(sizes + parameter)
    # Blocks begin at multiples of their length: reads and writes of 16 bytes are allowed, which Triton cannot know.
    gradient = tl.multiple_of(tl.load(gradients + parameter).to(tl.pointer_type(tl.bfloat16)) + element, [16])
    total = tl.multiple_of(tl.load(totals + parameter).to(tl.pointer_type(tl.float32)) + element, [16])
    tl.store(total, tl.load(total, mask=valid) + tl.load(gradient, mask=valid).to(tl.float32), mask=valid)
