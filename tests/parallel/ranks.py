"""What the tests of sequence parallelism run on every rank: one call on a rank's tokens, its outputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m1.kernels.lightning import layer_slopes
from megatron_m1.parallel.lasp import lasp_attention
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.parallel.ring_attention import ring_attention
from megatron_m1.parallel.segments import ModelCost
from tests.harness import nan_filled_empty
from tests.parallel.packs import bounds_of, named_packs

PAIRS_ONLY = ModelCost(per_token=0.0, per_pair=1.0, per_state=0.0)
"""A model that is all softmax attention and gets its states for nothing: it asks for the most segments."""


@dataclass(frozen=True)
class Case:
    """A pack and the sizes of the heads that attend in it."""

    bounds: list[int]
    cost: ModelCost | None = None
    heads: int = 3
    groups: int = 3
    dim: int = 8
    dtype: torch.dtype = torch.float64

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of the output over the whole pack, [T, heads or groups, dim], drawn from a seed."""
        generator = torch.Generator().manual_seed(sum(self.bounds))
        heads = (self.heads, self.groups, self.groups, self.heads)
        return tuple(
            torch.randn(self.bounds[-1], count, self.dim, generator=generator, dtype=torch.float64).to(self.dtype)
            for count in heads
        )

    def slopes(self) -> Tensor:
        """[heads], of a layer whose decays are neither all strong nor all weak."""
        return layer_slopes(self.heads, 3, 8)

    def layout(self, rank: int, ranks: int) -> SequenceLayout:
        """The pack on ``ranks``."""
        return SequenceLayout.build(
            self.bounds, context_parallel_size=ranks, context_parallel_rank=rank, cost=self.cost
        )


def cases_for(ranks: int, **sizes: int) -> dict[str, Case]:
    """Every pack that is easily got wrong, in zigzag order and dealt by work."""
    tokens = 10 * ranks
    found = {name: Case(bounds, **sizes) for name, bounds in named_packs(tokens, ranks).items()}
    found["more than two segments"] = Case(bounds_of([*[1] * (6 * ranks), 14 * ranks]), PAIRS_ONLY, **sizes)
    found["hundreds"] = Case(bounds_of([1, 2, 3] * (20 * ranks) + [7 * ranks]), PAIRS_ONLY, **sizes)
    assert found["more than two segments"].layout(0, ranks).segments_per_rank > 2
    return found


def whole(case: Case, parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """The ranks' tensors put together in the pack's order."""
    layouts = [case.layout(rank, len(parts)) for rank in range(len(parts))]
    tokens = torch.cat([layout.take_local(torch.arange(case.bounds[-1])) for layout in layouts])
    return [torch.cat(tensors)[tokens.argsort()] for tensors in zip(*parts, strict=True)]


def lasp_results(rank: int, ranks: int, cases: list[Case]) -> list[tuple[Tensor, ...]]:
    """Output, dq, dk, dv of this rank's tokens in every case; fresh memory is full of NaN."""
    group: Any = dist.group.WORLD
    results = []
    for case in cases:
        layout = case.layout(rank, ranks)
        q, k, v, grad = (layout.take_local(x).clone() for x in case.inputs())
        for x in (q, k, v):
            x.requires_grad_()
        with nan_filled_empty():
            output, entered = lasp_attention(q, k, v, case.slopes(), layout, group)
            again, _ = lasp_attention(q, k, v, case.slopes(), layout, group, entered=entered)
            output.backward(grad)
        assert torch.equal(output, again)
        results.append(tuple(x.detach() for x in (output, *(x.grad for x in (q, k, v) if x.grad is not None))))
    return results


def ring_results(rank: int, ranks: int, cases: list[Case]) -> list[tuple[Tensor, ...]]:
    """Output, dq, dk, dv of this rank's tokens in every case; fresh memory is full of NaN."""
    group: Any = dist.group.WORLD
    results = []
    for case in cases:
        layout = case.layout(rank, ranks)
        q, k, v, grad = (layout.take_local(x).clone() for x in case.inputs())
        for x in (q, k, v):
            x.requires_grad_()
        with nan_filled_empty():
            output = ring_attention(q, k, v, layout, group)
            output.backward(grad)
        results.append(tuple(x.detach() for x in (output, *(x.grad for x in (q, k, v) if x.grad is not None))))
    return results
