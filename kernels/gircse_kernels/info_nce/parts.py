"""A float32 number as a sum of bfloat16 numbers, so that the tensor cores multiply it without losing its accuracy.

Each part holds the next eight bits of what the parts before it leave: two parts have 16 bits, three all 24 of float32.
"""

import triton
import triton.language as tl


@triton.jit
def store_parts(ptr, distance, value, mask, PARTS: tl.constexpr):
    """Writes the parts of `value`, float32, at `ptr`, `ptr + distance`, .."""
    rest = value
    for part in tl.static_range(PARTS):
        high = rest.to(tl.bfloat16)
        tl.store(ptr + part * distance, high, mask=mask)
        rest -= high.to(tl.float32)


@triton.jit
def load_parts(ptr, distance, mask, PARTS: tl.constexpr):
    """The sum of the parts, float32, the smallest first."""
    value = tl.load(ptr + (PARTS - 1) * distance, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(ptr + (PARTS - 1 - part) * distance, mask=mask, other=0.0).to(tl.float32)
    return value
