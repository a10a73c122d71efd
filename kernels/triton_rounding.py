"""Rounding in kernels that also run under Triton's interpreter."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1); with bfloat16 it needs help."""


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """``x``, float32, in ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # Triton's interpreter cuts the bits off instead of rounding.
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
