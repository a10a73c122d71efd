"""Ring attention on several ranks against the scores of the whole pack under its mask, in float64.

Both sum the same float64 terms in another order, so they agree to some 1e-15 of the largest of them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.common.context_ranks import cases_for, ring_results, whole
from megatron_m1.runtime.pool import WorkerPool

TOLERANCE = 1e-12


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    """softmax(q k^T / sqrt(dim) + mask) v with all scores at once; [n, heads, dim]."""
    documents = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.tensor(bounds).diff())
    allowed = (documents[:, None] == documents[None, :]).tril()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_ranks_compute_what_one_process_computes(ranks: int, workers: WorkerPool) -> None:
    cases = cases_for(ranks, heads=6, groups=2)
    by_rank = workers.run(ring_results, list(cases.values()), world_size=ranks)
    for index, (name, case) in enumerate(cases.items()):
        q, k, v, grad = case.inputs()
        inputs = [x.requires_grad_() for x in (q, k, v)]
        truth = dense_attention(q, k, v, case.bounds)
        truth.backward(grad)
        wanted = [truth.detach(), *(x.grad for x in inputs)]
        found = whole(case, [results[index] for results in by_rank])
        for part, ours, theirs in zip(("o", "dq", "dk", "dv"), found, wanted, strict=True):
            assert theirs is not None
            error = (ours - theirs).abs().max() / theirs.abs().max()
            assert error < TOLERANCE, f"{name}: {part} {error}"
