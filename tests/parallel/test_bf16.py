"""Both layer kinds in bf16 on several ranks: no more error than one process makes, but for the further roundings.

Truth is float64 from the same bf16 inputs, an error the norm of the difference, and the measure one process in bf16:
the same kernel without any exchange. Parts of a softmax are bf16 and merged in fp32, so that a second rounding joins
that of the result (sqrt(2) of its error). What other ranks' states add is rounded, and so is the sum (sqrt(3)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common.context_ranks import Case, cases_for, lasp_results, ring_results, whole
from megatron_m1.kernels.lightning import lightning_attention
from megatron_m1.parallel.block_attention import Block, attend, attend_backward
from megatron_m1.runtime.pool import WorkerPool
from tests.parallel.test_ring_attention import dense_attention

RANKS = 5


def lightning(case: Case, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Output, dq, dk, dv of one process, from the case's inputs in ``dtype``."""
    q, k, v, grad = (x.to(dtype) for x in case.inputs())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    output = lightning_attention(q, k, v, case.slopes(), cu_seqlens=case.bounds, backend=backend)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def softmax_truth(case: Case) -> list[Tensor]:
    """Output, dq, dk, dv in float64."""
    q, k, v, grad = (x.double() for x in case.inputs())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    output = dense_attention(q, k, v, case.bounds)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def softmax_alone(case: Case) -> list[Tensor]:
    """The same of one process in the case's dtype."""
    q, k, v, grad = case.inputs()
    block = Block(case.bounds, case.bounds, causal=True)
    output, lse = attend(q, k, v, block)
    return [output, *attend_backward(grad, q, k, v, output, lse, block)]


def assert_as_exact(case: str, found: list[Tensor], alone: list[Tensor], truth: list[Tensor], factor: float) -> None:
    for part, ours, one, exact in zip(("o", "dq", "dk", "dv"), found, alone, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (ours, one))
        assert error <= factor * allowed, f"{case}: {part} {error}, of one process {allowed}"


def test_parts_of_a_softmax_are_merged_in_fp32(workers: WorkerPool) -> None:
    cases = cases_for(RANKS, heads=6, groups=2, dtype=torch.bfloat16)
    by_rank = workers.run(ring_results, list(cases.values()), world_size=RANKS)
    for index, (name, case) in enumerate(cases.items()):
        found = whole(case, [results[index] for results in by_rank])
        assert_as_exact(name, found, softmax_alone(case), softmax_truth(case), 2.0**0.5)


def test_states_join_bf16_outputs_with_one_rounding_each(workers: WorkerPool) -> None:
    cases = cases_for(RANKS, dtype=torch.bfloat16)
    by_rank = workers.run(lasp_results, list(cases.values()), world_size=RANKS)
    for index, (name, case) in enumerate(cases.items()):
        found = whole(case, [results[index] for results in by_rank])
        alone, truth = lightning(case, torch.bfloat16, "chunk"), lightning(case, torch.float64, "naive")
        assert_as_exact(name, found, alone, truth, 3.0**0.5)


def with_and_without_autocast(rank: int, ranks: int, case: Case) -> list[list[tuple[Tensor, ...]]]:
    """Both kinds' outputs and gradients, first as they are, then inside autocast."""
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(lasp_results(rank, ranks, [case]) + ring_results(rank, ranks, [case]))
    return found


def test_autocast_does_not_reach_other_ranks_states_and_blocks(workers: WorkerPool) -> None:
    case = Case([0, 3, 40], dtype=torch.float32)
    for plain, inside in workers.run(with_and_without_autocast, case, world_size=2):
        for parts, others in zip(plain, inside, strict=True):
            assert all(torch.equal(ours, other) for ours, other in zip(parts, others, strict=True))
