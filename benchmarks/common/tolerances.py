"""The error that rounding explains, derived and stated once: every test of lightning attention and of the gated norm
takes its tolerance from here, and so does what a benchmark checks before it times.

Errors are root mean squares over a head, relative to the norm of what is right.

Two rules. ``rounded`` is for forms that round nothing but results: torch's forms in any dtype, the kernels in float32,
the norm, the decode step. ``floor`` is for the Triton kernels in any dtype, beside twice the error of the naive form
whose operands are rounded to the inputs' dtype (``benchmarks/common/rounded_lightning.py``).
"""

from __future__ import annotations

import torch

from benchmarks.common.lightning_cases import KEY_DIM, VALUE_DIM

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""u: what rounding to nearest is off by at most, relative to the number."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sums(num_tokens: int, width: int = max(KEY_DIM, VALUE_DIM)) -> float:
    """Of a result of at most T D products (D is ``width``), each rounded to float32, as a random walk: sqrt(T D) u.

    Few products are no walk: 8 u at least.
    """
    return max(8.0, (num_tokens * width) ** 0.5) * UNIT[torch.float32]


def rounded(dtype: torch.dtype, num_tokens: int, width: int = max(KEY_DIM, VALUE_DIM), *, roundings: int = 1) -> float:
    """Sums in float32, and ``roundings`` to a dtype of 16 bits: the result's, and one of each operand that is rounded.

    In float64 sums are float64. There both sides round, and the recurrence multiplies up to T rounded decays: T u more.
    """
    if dtype == torch.float64:
        return (sums(num_tokens, width) / UNIT[torch.float32] + num_tokens) * UNIT[dtype]
    return sums(num_tokens, width) + (0.0 if dtype == torch.float32 else roundings * UNIT[dtype])


def floor(dtype: torch.dtype, num_tokens: int, width: int, *, state: bool) -> float:
    """What does not shrink with the rounded naive form's error: float32's sums, in which both differ.

    States, which the naive form updates from unrounded operands, the kernels add up from two rounded terms: what
    rounding to u leaves, rounded to u, is u^2.
    """
    unit = 0.0 if dtype == torch.float32 else UNIT[dtype]
    return sums(num_tokens, width) + (unit**2 if state else 0.0)
