"""LASP+ on several ranks against one process that goes token by token, in float64: outputs and every gradient.

Both sum the same float64 terms in another order, so they agree to some 1e-15 of the largest of them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_m1.kernels.lightning import lightning_attention
from tests.harness import WorkerPool
from tests.parallel.packs import bounds_of, named_packs
from tests.parallel.ranks import PAIRS_ONLY, Case, lasp_results

TOLERANCE = 1e-12


def cases_for(ranks: int, **sizes: int) -> dict[str, Case]:
    """Every pack that is easily got wrong, in zigzag order and dealt by work."""
    tokens = 10 * ranks
    found = {name: Case(bounds, **sizes) for name, bounds in named_packs(tokens, ranks).items()}
    found["more than two segments"] = Case(bounds_of([*[1] * (6 * ranks), 14 * ranks]), PAIRS_ONLY, **sizes)
    found["hundreds"] = Case(bounds_of([1, 2, 3] * (20 * ranks) + [7 * ranks]), PAIRS_ONLY, **sizes)
    return found


def whole(case: Case, parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """The ranks' tensors put together in the pack's order."""
    layouts = [case.layout(rank, len(parts)) for rank in range(len(parts))]
    tokens = torch.cat([layout.take_local(torch.arange(case.bounds[-1])) for layout in layouts])
    return [torch.cat(tensors)[tokens.argsort()] for tensors in zip(*parts, strict=True)]


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_ranks_compute_what_one_process_computes(ranks: int, workers: WorkerPool) -> None:
    cases = cases_for(ranks)
    assert cases["more than two segments"].layout(0, ranks).segments_per_rank > 2
    by_rank = workers.run(lasp_results, list(cases.values()), world_size=ranks)
    for index, (name, case) in enumerate(cases.items()):
        q, k, v, grad = case.inputs()
        inputs = [x.requires_grad_() for x in (q, k, v)]
        truth = lightning_attention(*inputs, case.slopes(), cu_seqlens=case.bounds, backend="naive")
        truth.backward(grad)
        wanted = [truth.detach(), *(x.grad for x in inputs)]
        found = whole(case, [results[index] for results in by_rank])
        for part, ours, theirs in zip(("o", "dq", "dk", "dv"), found, wanted, strict=True):
            assert theirs is not None
            error = (ours - theirs).abs().max() / theirs.abs().max()
            assert error < TOLERANCE, f"{name}: {part} {error}"
