"""LASP+ on several ranks against one process that goes token by token, in float64: outputs and every gradient.

Both sum the same terms in another order, so in float64 they agree to some 1e-15 of the largest of them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.common.context_ranks import Case, cases_for, lasp_results, whole
from benchmarks.common.tolerances import rounded
from megatron_m1.kernels.lightning import lightning_attention
from megatron_m1.runtime.pool import WorkerPool

TOLERANCE = 1e-12


def compare(name: str, case: Case, by_rank: list[tuple[Tensor, ...]], tolerance: float) -> None:
    q, k, v, grad = (x.double() for x in case.inputs())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    truth = lightning_attention(q, k, v, case.slopes(), cu_seqlens=case.bounds, backend="naive")
    truth.backward(grad)
    wanted = [truth.detach(), *(x.grad for x in inputs)]
    for part, ours, theirs in zip(("o", "dq", "dk", "dv"), whole(case, by_rank), wanted, strict=True):
        assert theirs is not None
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance, f"{name}: {part} {error}"


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_ranks_compute_what_one_process_computes(ranks: int, workers: WorkerPool) -> None:
    cases = cases_for(ranks)
    by_rank = workers.run(lasp_results, list(cases.values()), world_size=ranks)
    for index, (name, case) in enumerate(cases.items()):
        compare(name, case, [results[index] for results in by_rank], TOLERANCE)


def test_ranks_on_the_kernels(workers: WorkerPool) -> None:
    """As on GPUs: states and local attention by the Triton kernels, here interpreted, in float32."""
    of_all = cases_for(2, dtype=torch.float32)
    names = ("one document over all ranks", "starts on some bounds", "more than two segments")
    by_rank = workers.run(lasp_results, [of_all[name] for name in names], "triton", world_size=2)
    for index, name in enumerate(names):
        case = of_all[name]
        tolerance = rounded(torch.float32, case.bounds[-1], case.dim)
        compare(name, case, [results[index] for results in by_rank], tolerance)
