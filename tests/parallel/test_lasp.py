"""LASP+ on several ranks against one process that goes token by token, in float64: outputs and every gradient.

Both sum the same float64 terms in another order, so they agree to some 1e-15 of the largest of them.
"""

from __future__ import annotations

import pytest

from megatron_m1.kernels.lightning import lightning_attention
from tests.harness import WorkerPool
from tests.parallel.ranks import cases_for, lasp_results, whole

TOLERANCE = 1e-12


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_ranks_compute_what_one_process_computes(ranks: int, workers: WorkerPool) -> None:
    cases = cases_for(ranks)
    by_rank = workers.run(lasp_results, list(cases.values()), world_size=ranks)
    for index, (name, case) in enumerate(cases.items()):
        q, k, v, grad = case.inputs()
        inputs = [x.requires_grad_() for x in (q, k, v)]
        truth = lightning_attention(q, k, v, case.slopes(), cu_seqlens=case.bounds, backend="naive")
        truth.backward(grad)
        wanted = [truth.detach(), *(x.grad for x in inputs)]
        found = whole(case, [results[index] for results in by_rank])
        for part, ours, theirs in zip(("o", "dq", "dk", "dv"), found, wanted, strict=True):
            assert theirs is not None
            error = (ours - theirs).abs().max() / theirs.abs().max()
            assert error < TOLERANCE, f"{name}: {part} {error}"
