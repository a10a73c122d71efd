"""Both layer kinds on random packs and numbers of ranks against one process, in float64: outputs and every gradient.

The tolerance is that of the fixed packs, ``test_lasp.py`` and ``test_ring_attention.py``.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.common.context_ranks import PAIRS_ONLY, Case, lasp_results, ring_results, whole
from benchmarks.common.packs import packs_and_ranks
from megatron_m1.kernels.lightning import lightning_attention
from megatron_m1.runtime.pool import WorkerPool
from tests.parallel.test_ring_attention import TOLERANCE, dense_attention


def check(case: Case, parts: list[tuple[Tensor, ...]], truth: Tensor, inputs: list[Tensor], grad: Tensor) -> None:
    truth.backward(grad)
    wanted = [truth.detach(), *(x.grad for x in inputs)]
    for name, ours, theirs in zip(("o", "dq", "dk", "dv"), whole(case, parts), wanted, strict=True):
        assert theirs is not None
        # Documents of one token have a softmax whose dq and dk are 0.
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp(min=1.0), name


@settings(max_examples=15, deadline=None)
@given(packs_and_ranks(least_ranks=2, most_ranks=5), st.booleans())
def test_random_packs(workers: WorkerPool, pack: tuple[list[int], int], by_work: bool) -> None:
    bounds, ranks = pack
    cost = PAIRS_ONLY if by_work else None
    case = Case(bounds, cost)
    q, k, v, grad = case.inputs()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    truth = lightning_attention(q, k, v, case.slopes(), cu_seqlens=bounds, backend="naive")
    by_rank = workers.run(lasp_results, [case], world_size=ranks)
    check(case, [results[0] for results in by_rank], truth, inputs, grad)

    case = Case(bounds, cost, heads=4, groups=2)
    q, k, v, grad = case.inputs()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    by_rank = workers.run(ring_results, [case], world_size=ranks)
    check(case, [results[0] for results in by_rank], dense_attention(q, k, v, bounds), inputs, grad)
