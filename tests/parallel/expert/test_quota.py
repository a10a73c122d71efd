"""Capacity over all ranks: shares, what is dropped, and that the number dropped is no matter of how ranks are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist

from megatron_m1.parallel.expert.quota import capacity, keep_most_likely, share_capacity, within_capacity
from megatron_m1.runtime.pool import WorkerPool

counts = st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=7)


@given(counts, st.integers(0, 120))
@settings(max_examples=200, deadline=None)
def test_shares_by_the_rule(waiting: list[list[int]], limit: int) -> None:
    """In whole numbers, one expert after the other."""
    shares = share_capacity(torch.tensor(waiting), limit).tolist()
    for expert in range(3):
        here = [row[expert] for row in waiting]
        total = sum(here)
        if total <= limit:
            expected = here
        else:
            expected = [n * limit // total for n in here]
            for rank in range(len(here)):
                if sum(expected) < limit and here[rank] * limit % total:
                    expected[rank] += 1
            assert sum(expected) == limit
        assert [row[expert] for row in shares] == expected
        assert all(share <= n for share, n in zip(expected, here, strict=True))


def test_keeps_the_most_likely_and_the_first_of_equals() -> None:
    probs = torch.tensor([[0.5, 0.2], [0.9, 0.0], [0.5, 0.4], [0.0, 0.4]])
    chosen = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1]]).bool()
    kept = keep_most_likely(probs, chosen, torch.tensor([2, 1]))
    assert kept.tolist() == [[True, False], [True, False], [False, True], [False, False]]


def test_a_chosen_token_of_probability_zero_goes_before_none() -> None:
    """Underflow makes zeros; a place is not lost to a token that did not ask for it."""
    kept = keep_most_likely(torch.zeros(3, 1), torch.tensor([[False], [True], [True]]), torch.tensor([1]))
    assert kept.tolist() == [[False], [True], [False]]


def routed(tokens: int, experts: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    # Experts are chosen more often the lower their number.
    scores = torch.rand(tokens, experts, generator=generator) + torch.linspace(0.5, 0.0, experts)
    chosen = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(topk).indices, True)
    return scores * chosen, chosen


def kept_here(rank: int, world_size: int, factor: float, sizes: list[int], padding: int) -> Any:
    probs, chosen = routed(sum(sizes), 4, 2)
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    counted = torch.arange(sum(sizes))[mine] < sum(sizes) - padding
    assert dist.group.WORLD is not None
    return within_capacity(
        probs[mine], chosen[mine], topk=2, factor=factor, counted=counted if padding else None, group=dist.group.WORLD
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("padding", [0, 5])
def test_however_ranks_are_cut_as_many_are_dropped(factor: float, padding: int, workers: WorkerPool) -> None:
    total = 61
    expected = None
    for sizes in ([61], [31, 30], [20, 0, 41], [11, 20, 13, 17]):
        kept = torch.cat(workers.run(kept_here, factor, sizes, padding, world_size=len(sizes)))
        numbers = kept.sum(0)
        _, chosen = routed(total, 4, 2)
        assert not (kept & ~chosen).any()
        assert not kept[total - padding :].any()
        limit = capacity(total - padding, 2, 4, factor)
        assert torch.equal(numbers, chosen[: total - padding].sum(0).clamp_max(limit))
        expected = numbers if expected is None else expected
        assert torch.equal(numbers, expected)
