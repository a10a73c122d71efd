"""What the tests of sequence parallelism run on every rank: one call on a rank's tokens, its outputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.packs import bounds_of, named_packs
from benchmarks.common.poison import nan_filled_empty
from megatron_m1.kernels.lightning import layer_slopes
from megatron_m1.parallel.balance import ModelCost
from megatron_m1.parallel.lasp import lasp_attention
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.parallel.ring_attention import ring_attention
from megatron_m1.parallel.traffic import ring_traffic, state_traffic

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


def cases_for(ranks: int, **sizes: Any) -> dict[str, Case]:
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


def lasp_results(rank: int, ranks: int, cases: list[Case], backend: str | None = None) -> list[tuple[Tensor, ...]]:
    """Output, dq, dk, dv of this rank's tokens in every case; fresh memory is full of NaN."""
    group: Any = dist.group.WORLD
    results = []
    for case in cases:
        layout = case.layout(rank, ranks)
        q, k, v, grad = (layout.take_local(x).clone() for x in case.inputs())
        for x in (q, k, v):
            x.requires_grad_()
        with nan_filled_empty():
            output, entered = lasp_attention(q, k, v, case.slopes(), layout, group, backend=backend)
            again, _ = lasp_attention(q, k, v, case.slopes(), layout, group, entered=entered, backend=backend)
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


class _Counted(TorchDispatchMode):
    """Bytes that leave and reach this rank through any process group while it is entered.

    torch sends every operation of a process group through its dispatcher, whichever Python function asked for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any) -> None:
        if func is torch.ops.c10d._allgather_base_.default:
            gathered, own = args[:2]
            others = gathered.nbytes - own.nbytes
            self.sent, self.received = self.sent + others, self.received + others
        elif func is torch.ops.c10d.send.default:
            self.sent += sum(tensor.nbytes for tensor in args[0])
        elif func is torch.ops.c10d.recv_.default:
            self.received += sum(tensor.nbytes for tensor in args[0])
        else:
            raise AssertionError(f"{func} is in no plan")


def counted_bytes(rank: int, ranks: int, cases: list[Case]) -> list[dict[str, tuple[int, int]]]:
    """Bytes (sent, received) of forward and of backward of both layer kinds, in every case."""
    group: Any = dist.group.WORLD
    found = []
    for case in cases:
        layout = case.layout(rank, ranks)
        q, k, v, grad = (layout.take_local(x).clone().requires_grad_() for x in case.inputs())
        heads = case.heads // case.groups
        wide_k, wide_v = (x.detach().repeat_interleave(heads, dim=1).requires_grad_() for x in (k, v))
        counts = {}
        with _Counted() as counted:
            output, _ = lasp_attention(q, wide_k, wide_v, case.slopes(), layout, group)
        counts["lasp forward"] = (counted.sent, counted.received)
        with _Counted() as counted:
            output.backward(grad)
        counts["lasp backward"] = (counted.sent, counted.received)
        with _Counted() as counted:
            output = ring_attention(q, k, v, layout, group)
        counts["ring forward"] = (counted.sent, counted.received)
        with _Counted() as counted:
            output.backward(grad)
        counts["ring backward"] = (counted.sent, counted.received)
        found.append(counts)
    return found


def predicted_bytes(rank: int, ranks: int, case: Case) -> dict[str, tuple[int, int]]:
    """What ``counted_bytes`` should find, from the plans alone."""
    layout, size = case.layout(rank, ranks), torch.empty(0, dtype=case.dtype).element_size()
    wide = max(size, 4)
    ring = ring_traffic(
        layout.ring_plan,
        token_bytes=2 * case.groups * case.dim * size,
        gradient_bytes=2 * case.groups * case.dim * wide,
    )
    lasp = state_traffic(layout.state_plan, ranks, state_bytes=case.heads * case.dim**2 * wide)
    names = ("lasp forward", "lasp backward", "ring forward", "ring backward")
    return {name: (way.sent, way.received) for name, way in zip(names, (*lasp, *ring), strict=True)}
