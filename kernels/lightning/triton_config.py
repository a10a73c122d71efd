"""How the walk is compiled: few configurations, each with its reason."""

from dataclasses import dataclass

import torch

type Silu = tuple[bool, bool, bool]
NO_SILU: Silu = (False, False, False)


@dataclass(frozen=True)
class WalkConfig:
    """Compile-time choices of ``triton_walk.walk`` for one pair of head dims and one dtype."""

    block_t: int
    """Tokens of a chunk."""
    block_a: int
    """A, padded to a power of two: a program holds all rows of a state."""
    block_c: int
    """Columns of a state that a program holds."""
    warps: int
    stages: int
    """Chunks in flight: 2 loads the next one while this one is multiplied."""
    precision: str
    """Of products of float32: three TF32 products reach float32's."""


def _padded(size: int) -> int:
    """The power of two that holds ``size``; 16 is the least that the matrix instructions take."""
    return max(16, 1 << (size - 1).bit_length())


def walk_config(width_a: int, width_c: int, dtype: torch.dtype, capability: int, silu: Silu = NO_SILU) -> WalkConfig:
    """The configuration for states [width_a, width_c].

    16 bits: chunks of 64 tokens are the least that wgmma takes, and more would waste products above the diagonal; 8
    warps and 64 columns hold a state of 128 rows in 32 registers a thread. SiLU widens its rows to float32 in registers
    and mma.sync keeps both operands there: that leaves room for less. Compiled, none of these spills up to 128 rows.

    Args:
        width_a: rows of the state.
        width_c: its columns.
        dtype: of the inputs.
        capability: of the GPU, 10 x major + minor.
        silu: which of a, b, c go through SiLU.
    """
    block_a, block_c = _padded(width_a), _padded(width_c)
    if dtype == torch.float32:
        return WalkConfig(16, block_a, min(block_c, 16), 4 if block_a <= 128 else 8, 2, "tf32x3")
    if capability < 90:
        return WalkConfig(32, block_a, min(block_c, 32), 4 if block_a <= 64 else 8, 3, "ieee")
    wide = any(silu) or block_a > 128
    # With a second chunk in flight, the walk for dv spills 96 bytes a thread on sm_90.
    stages = 1 if silu == (True, True, False) and capability < 100 else 2 if wide else 3
    return WalkConfig(64, block_a, min(block_c, 32 if wide else 64), 8, stages, "ieee")
