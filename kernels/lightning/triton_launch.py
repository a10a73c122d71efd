"""One direction of lightning attention over a pack: what is launched, with which arguments."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from megatron_m1.kernels.lightning.triton_config import NO_SILU, Silu, WalkConfig
from megatron_m1.kernels.lightning.triton_walk import chain, walk
from megatron_m1.kernels.lightning.walk_plan import Plan, plan_walk, segment_tokens

CHAIN_BLOCK = 1024
MAX_SEGMENTS = 65535
"""Of one launch: the second dimension of a grid ends there."""


@dataclass(frozen=True)
class Documents:
    """The documents of a pack, and whether they begin with states and leave some."""

    bounds: tuple[int, ...]
    has_initial: bool = False
    keeps_final: bool = False
    segment_tokens: int | None = None
    """The longest segment that one program walks; None chooses by the GPU."""

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.bounds) - 1

    def plan(self, walk: "Walk") -> Plan:
        """Cut the pack for ``walk``."""
        most = walk.segment_tokens(self.bounds[-1]) if self.segment_tokens is None else self.segment_tokens
        first, last = (self.keeps_final, self.has_initial) if walk.reverse else (self.has_initial, self.keeps_final)
        return plan_walk(self.bounds, first, last, most, walk.reverse)


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 where Triton's interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True)
class Walk:
    """One direction over a pack: which tensors take which part, see ``triton_walk.py``."""

    config: WalkConfig
    a: Tensor
    """[T, H, A], the queries' part."""
    b: Tensor
    """[T, H, A], the keys' part."""
    c: Tensor
    """[T, H, C], the values' part."""
    slopes: Tensor
    """[H] float32."""
    reverse: bool = False
    transposed: bool = False
    """States are [N, H, C, A] in memory, as seen from this walk."""
    silu: Silu = NO_SILU
    """Take a, b, c through SiLU."""

    @property
    def sizes(self) -> tuple[int, int]:
        """A and C."""
        return self.b.shape[2], self.c.shape[2]

    @property
    def programs(self) -> int:
        """Programs that walk one segment."""
        return self.c.shape[1] * triton.cdiv(self.sizes[1], self.config.block_c)

    def segment_tokens(self, tokens: int) -> int:
        """Tokens of the longest segment of a pack of ``tokens``."""
        processors, config = _processors(self.c.device), self.config
        return segment_tokens(tokens, self.programs, processors, config.resident, config.block_t)

    def launch(
        self,
        segments: Tensor,
        output: Tensor | None,
        state_in: Tensor | None,
        carry_in: Tensor | None,
        state_out: Tensor | None,
        *,
        keys: bool = True,
        raw: Tensor | None = None,
    ) -> None:
        """Write ``output`` [T, H, C], times SiLU's derivative at ``raw``, and ``state_out`` of ``segments`` [S, 5]."""
        (width_a, width_c), heads, config = self.sizes, self.c.shape[1], self.config
        unused = self.slopes
        rows = [self.a, self.b, self.c, unused if output is None else output, unused if raw is None else raw]
        # Strides by token and by head of each; what is unused has one dimension, so it gets zeros.
        strides = [stride for x in rows for stride in (x.stride()[:2] if x.dim() == 3 else (0, 0))]
        states = [unused if x is None else x for x in (state_in, carry_in, state_out)]
        state_strides = (1, width_a) if self.transposed else (width_c, 1)
        for table in self._there(segments).split(MAX_SEGMENTS):
            walk[(self.programs, table.shape[0])](
                *rows, self.slopes, table, *states, heads, *strides, *state_strides,
                A=width_a, C=width_c, BLOCK_T=config.block_t, BLOCK_A=config.block_a, BLOCK_C=config.block_c,
                REVERSE=self.reverse, QUERIES=output is not None, KEYS=keys,
                STATES_IN=state_in is not None, CARRIES_IN=carry_in is not None, STATES_OUT=state_out is not None,
                SILU_A=self.silu[0], SILU_B=self.silu[1], SILU_C=self.silu[2], SILU_GRAD=raw is not None,
                STAGES=config.stages, num_warps=config.warps,
            )  # fmt: skip

    def _there(self, table: Tensor) -> Tensor:
        """A plan's table on the device, without waiting for it."""
        return table.to(self.c.device, non_blocking=True)

    def carries(self, plan: Plan, state_in: Tensor | None, keys: bool = True) -> Tensor | None:
        """States entering the later segments of documents cut in several, [M, H, ...] as the caller's states."""
        if not plan.carries.shape[0]:
            return None
        shape = self.sizes[::-1] if self.transposed else self.sizes
        heads, device = self.c.shape[1], self.c.device
        carries = torch.empty(plan.carries.shape[0], heads, *shape, dtype=torch.float32, device=device)
        self.launch(plan.carries, None, state_in, None, carries, keys=keys)
        size = shape[0] * shape[1]
        chain[(triton.cdiv(size, CHAIN_BLOCK), heads, plan.chains.shape[0])](
            carries, self.slopes, self._there(plan.carries), self._there(plan.chains), heads,
            SIZE=size, BLOCK=CHAIN_BLOCK,
        )  # fmt: skip
        return carries
