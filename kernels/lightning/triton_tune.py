"""Which of a walk's few configurations is used: measured once per process and kind of walk, on the GPU at hand."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from megatron_m1.kernels.lightning.triton_config import NO_SILU, Silu, WalkConfig, walk_configs
from megatron_m1.kernels.lightning.triton_launch import Walk
from megatron_m1.kernels.lightning.walk_plan import plan_walk

TOKENS = 4096
"""Of the pack that is measured: 64 chunks are enough to fill the pipeline, and take some 0.1 ms."""


@dataclass(frozen=True)
class Kind:
    """What the choice depends on; nothing that differs from call to call, such as lengths."""

    heads: int
    width_a: int
    width_c: int
    dtype: torch.dtype
    device: torch.device
    reverse: bool
    transposed: bool
    silu: Silu

    @property
    def candidates(self) -> tuple[WalkConfig, ...]:
        """The configurations to choose from."""
        return walk_configs(self.width_a, self.width_c, self.dtype, _capability(self.device), self.silu)


def _capability(device: torch.device) -> int:
    """10 x major + minor; the interpreter takes what an H100 would."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tuned_walk(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    slopes: Tensor,
    *,
    reverse: bool = False,
    transposed: bool = False,
    silu: Silu = NO_SILU,
) -> Walk:
    """The walk over these tensors, in the fastest configuration.

    Ranks measure on their own and may choose differently. No two of them compute the same numbers here (tensor ranks
    have other heads, context and data ranks other tokens), and within a process the choice stays, so that recomputed
    activations are those of the forward pass. All configurations have the same chunks and round the same operands: what
    can differ, as between a run and its continuation, is the rounding of float32 sums.
    """
    kind = Kind(c.shape[1], b.shape[2], c.shape[2], c.dtype, c.device, reverse, transposed, silu)
    measure = c.device.type == "cuda" and len(kind.candidates) > 1
    config = _measured(kind) if measure else kind.candidates[0]
    return Walk(config, a, b, c, slopes, reverse, transposed, silu)


@functools.cache
def _measured(kind: Kind) -> WalkConfig:
    return fastest(kind, lambda run: triton.testing.do_bench(run, return_mode="median"))


def fastest(kind: Kind, time: Callable[[Callable[[], None]], float], tokens: int = TOKENS) -> WalkConfig:
    """The candidate with the least ``time`` of a walk over ``tokens``, cut so that it fills the GPU."""
    # Zeros: random numbers would move the generators that training uses.
    a, b = (torch.zeros(tokens, kind.heads, kind.width_a, dtype=kind.dtype, device=kind.device) for _ in range(2))
    c, output = (torch.zeros(tokens, kind.heads, kind.width_c, dtype=kind.dtype, device=kind.device) for _ in range(2))
    slopes = torch.ones(kind.heads, device=kind.device)
    times = []
    for config in kind.candidates:
        walk = Walk(config, a, b, c, slopes, kind.reverse, kind.transposed, kind.silu)
        bounds = (*range(0, tokens, walk.segment_tokens(tokens)), tokens)
        table = plan_walk(bounds, False, False, tokens, kind.reverse).segments.to(kind.device)
        times.append(time(functools.partial(walk.launch, table, output, None, None, None)))
    return kind.candidates[times.index(min(times))]
