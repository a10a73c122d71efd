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

    @property
    def resident(self) -> int:
        """Programs that a processor holds: its 65,536 registers are those of 8 warps at the counts that are reached."""
        return max(1, 8 // self.warps)


def _padded(size: int) -> int:
    """The power of two that holds ``size``; 16 is the least that the matrix instructions take."""
    return max(16, 1 << (size - 1).bit_length())


def walk_configs(
    width_a: int, width_c: int, dtype: torch.dtype, capability: int, silu: Silu = NO_SILU
) -> tuple[WalkConfig, ...]:
    """The configurations for states [width_a, width_c] among which ``triton_tune.py`` measures; the first by default.

    16 bits: chunks of 64 tokens are the least that wgmma and tcgen05 take, and more would waste products above the
    diagonal; mma.sync takes 32. 8 warps and 64 columns hold a state of 128 rows in 32 registers a thread. SiLU widens
    its rows to float32 in registers, which leaves room for 32 columns. None of these spills with up to 128 rows, in any
    variant that runs (``make aot`` compiles them all).

    On Hopper there is a choice, without SiLU. Wide tiles read the rows of a and b least often; slim ones (4 warps) fit
    twice in a processor, so that one program computes while the other waits for its chunk, and repeat no product: of 8
    warps both halves multiply the same 64 rows. Which one wins depends on how fast L2 gives the rows again.

    32 bits: small tiles, whose products are exact. Three TF32 products each would spill 300 bytes to 6 KiB a thread.

    All configurations for the same tensors have the same chunks: they round the same operands and add the same numbers.

    Args:
        width_a: rows of the state.
        width_c: its columns.
        dtype: of the inputs.
        capability: of the GPU, 10 x major + minor.
        silu: which of a, b, c go through SiLU.
    """
    block_a, block_c = _padded(width_a), _padded(width_c)
    if dtype == torch.float32:
        return (WalkConfig(16, block_a, min(block_c, 16), 4 if block_a <= 64 else 8, 2),)
    # These GPUs have no asynchronous products (wgmma, tcgen05), and as little as 99 KiB of shared memory.
    if capability < 90 or capability >= 120:
        if any(silu):
            return (WalkConfig(32, block_a, min(block_c, 64), 8, 2),)
        return (WalkConfig(32, block_a, min(block_c, 32), 4 if block_a <= 64 else 8, 4),)
    columns, stages = (32, 2) if any(silu) or block_a > 128 else (64, 3)
    wide = WalkConfig(64, block_a, min(block_c, columns), 8, stages)
    # Slim tiles of Blackwell gain nothing, its products are in tensor memory; through SiLU they spill or nearly do.
    if capability >= 100 or max(block_a, block_c) > 128 or any(silu):
        return (wide,)
    return wide, WalkConfig(64, block_a, min(block_c, 32), 4, 2)
