"""The plans of a layout against counting token by token, on up to 64 ranks, without starting any."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.common.packs import bounds_of, named_packs, packs_and_ranks
from megatron_m1.parallel.balance import BALANCE, ModelCost, by_work, causal_pairs, choose_segments, cut
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.parallel.scan import Link, scan

PAIRS_ONLY = ModelCost(per_token=0.0, per_pair=1.0, per_state=0.0)
"""A model that is all softmax attention and gets its states for nothing: it asks for the most segments."""
COSTS = st.sampled_from([None, PAIRS_ONLY, ModelCost(10.0, 1.0, 0.0), ModelCost(1.0, 1.0, 20.0)])


def layouts_of(bounds: list[int], ranks: int, cost: ModelCost | None = None) -> list[SequenceLayout]:
    """One layout per rank."""
    return [
        SequenceLayout.build(bounds, context_parallel_size=ranks, context_parallel_rank=rank, cost=cost)
        for rank in range(ranks)
    ]


def tokens_of(layout: SequenceLayout) -> np.ndarray:
    """[local_tokens] global tokens of a rank."""
    return np.concatenate([np.arange(start, end) for start, end in layout.segments])


def documents_of(bounds: list[int]) -> np.ndarray:
    """[total_tokens] document of every token."""
    return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))


@settings(max_examples=60, deadline=None)
@given(pack=packs_and_ranks(), cost=COSTS)
def test_every_token_has_one_rank_and_every_rank_as_many(pack: tuple[list[int], int], cost: ModelCost | None) -> None:
    bounds, ranks = pack
    layouts = layouts_of(bounds, ranks, cost)
    held = [tokens_of(layout) for layout in layouts]
    assert sorted(np.concatenate(held).tolist()) == list(range(bounds[-1])), "no document is padded, no token is lost"
    documents = documents_of(bounds)
    positions = np.arange(bounds[-1]) - np.asarray(bounds)[documents]
    lengths = np.diff(layouts[0].segment_bounds)
    assert lengths.max() - lengths.min() <= 1
    for layout, tokens in zip(layouts, held, strict=True):
        assert layout.local_tokens == len(tokens) == bounds[-1] // ranks
        assert layout.segment_bounds == layouts[0].segment_bounds and layout.owners == layouts[0].owners
        assert (np.diff(tokens) > 0).all()
        assert layout.positions.tolist() == positions[tokens].tolist()
        assert layout.take_local(torch.arange(bounds[-1])).tolist() == tokens.tolist()
        # A piece ends where the document or the segment does.
        ends = (np.diff(documents[tokens]) != 0) | np.isin(tokens[1:], layout.segment_bounds)
        assert layout.local_document_bounds == (0, *(np.flatnonzero(ends) + 1).tolist(), len(tokens))
        assert layout.local_cu_seqlens.tolist() == list(layout.local_document_bounds)


@settings(max_examples=60, deadline=None)
@given(pack=packs_and_ranks(), cost=COSTS)
def test_every_query_meets_every_key_of_its_document_once(pack: tuple[list[int], int], cost: ModelCost | None) -> None:
    bounds, ranks = pack
    _check_coverage(bounds, ranks, cost)


def _check_coverage(bounds: list[int], ranks: int, cost: ModelCost | None) -> None:
    layouts = layouts_of(bounds, ranks, cost)
    held = [tokens_of(layout) for layout in layouts]
    documents = documents_of(bounds)
    met = np.zeros((bounds[-1], bounds[-1]), dtype=np.int8)
    distances = [[step.distance for step in layout.ring_plan.steps] for layout in layouts]
    assert all(found == distances[0] for found in distances), "every rank takes part in the same exchanges"
    for rank, layout in enumerate(layouts):
        mine, plan = held[rank], layout.ring_plan
        for start, end in zip(plan.local_bounds[:-1], plan.local_bounds[1:], strict=True):
            met[np.ix_(mine[start:end], mine[start:end])] += np.tri(end - start, dtype=np.int8)
        for index, step in enumerate(plan.steps):
            behind = (rank - step.distance) % ranks
            sender = layouts[behind].ring_plan.steps[index]
            assert sender.sent == step.receives
            block = np.concatenate([np.arange(0), *(held[behind][start:end] for start, end in sender.sends)])
            met_keys = np.zeros(len(block), dtype=bool)
            for rectangle in step.rectangles:
                (q_start, q_end), (k_start, k_end) = rectangle.queries, rectangle.keys
                assert q_end > q_start and k_end > k_start
                met[np.ix_(mine[q_start:q_end], block[k_start:k_end])] += 1
                met_keys[k_start:k_end] = True
            assert met_keys.all(), "no key travels for nothing"
    wanted = np.tri(bounds[-1], dtype=bool) & (documents[:, None] == documents[None, :])
    assert (met == wanted).all()


@pytest.mark.parametrize("ranks", [2, 3, 5, 64])
def test_packs_that_go_wrong_most_easily(ranks: int) -> None:
    for bounds in named_packs(8 * ranks, ranks).values():
        for cost in (None, PAIRS_ONLY):
            _check_coverage(bounds, ranks, cost)
            _check_states(bounds, ranks, cost)


@settings(max_examples=60, deadline=None)
@given(pack=packs_and_ranks(), cost=COSTS)
def test_every_state_gathers_the_tokens_before_it(pack: tuple[list[int], int], cost: ModelCost | None) -> None:
    bounds, ranks = pack
    _check_states(bounds, ranks, cost)


class _Shift:
    """A transition that adds the tokens it passes to every age that has begun to count."""

    def carry(self, state: torch.Tensor, link: Link) -> torch.Tensor:
        return state + link.tokens * (state > 0)


def _check_states(bounds: list[int], ranks: int, cost: ModelCost | None) -> None:
    """Follow an age instead of a state: each token's contribution is the number of tokens since, kept apart by row."""
    layouts = layouts_of(bounds, ranks, cost)
    held = [tokens_of(layout) for layout in layouts]
    documents, total = documents_of(bounds), bounds[-1]
    plans = [layout.state_plan for layout in layouts]
    inner = np.asarray(layouts[0].segment_bounds[1:-1], dtype=np.int64)
    crossing = documents[inner - 1] == documents[inner]
    assert all(plan.is_empty for plan in plans) == (not crossing.any())
    assert len({plan.is_empty for plan in plans}) == 1, "all ranks decide alike"
    for forward in (True, False):
        exchanges = [plan.forward if forward else plan.backward for plan in plans]
        assert len({exchange.slots for exchange in exchanges}) == 1
        assert sum(len(exchange.sends) for exchange in exchanges) == crossing.sum(), "nothing else is sent"
        local = torch.zeros(ranks * exchanges[0].slots, 1, total, 1)
        for rank, exchange in enumerate(exchanges):
            for slot, (start, end) in enumerate(exchange.sends):
                tokens = held[rank][start:end]
                ages = np.arange(end - start, 0, -1) if forward else np.arange(1, end - start + 1)
                local[rank * exchange.slots + slot, 0, tokens, 0] = torch.from_numpy(ages).float()
        for rank, exchange in enumerate(exchanges):
            states = scan(exchange.chains, local, _Shift(), len(exchange.receives))
            for state, (start, end) in zip(states, exchange.receives, strict=True):
                first, last = held[rank][start], held[rank][end - 1]
                everywhere = np.arange(total)
                # Tokens of the document before the piece that a state enters, or after the one that it leaves.
                age = first - everywhere if forward else everywhere - last
                wanted = np.where((documents == documents[first]) & (age > 0), age, 0)
                assert state.flatten().tolist() == wanted.tolist()


class _Matrices:
    """A transition with a matrix for every segment, as gated delta rules have: row ``source`` came with its state."""

    def __init__(self, matrices: torch.Tensor) -> None:
        self.matrices = matrices  # [R, 1, D, D]

    def carry(self, state: torch.Tensor, link: Link) -> torch.Tensor:
        return self.matrices[link.source] @ state


def test_a_matrix_for_a_transition_takes_no_other_scan() -> None:
    """S_t = A_t S_(t-1) + B_t, both ways over a pack: states that enter heads, and gradients that leave tails."""
    bounds, ranks, dim = [0, 3, 41, 44, 60], 3, 3
    generator = torch.Generator().manual_seed(1)
    a, b, read = (torch.randn(60, dim, dim, generator=generator, dtype=torch.float64) / 2 for _ in range(3))
    starts = torch.tensor(bounds)[:-1]
    layouts = layouts_of(bounds, ranks)
    held = [tokens_of(layout) for layout in layouts]
    for forward in (True, False):
        # Backward, token t passes on the gradient D to A_t^T D + A_t^T R_t, R_t being what reading the state leaves.
        step = a if forward else a.mT
        own = b if forward else a.mT @ read
        after = torch.zeros(61, dim, dim, dtype=torch.float64)
        for t in range(60) if forward else reversed(range(60)):
            new_document = t in starts if forward else t + 1 in torch.tensor(bounds)
            after[t] = own[t] + (0.0 if new_document else step[t] @ after[t - 1 if forward else t + 1])
        exchanges = [layout.state_plan.forward if forward else layout.state_plan.backward for layout in layouts]
        slots = exchanges[0].slots
        local, matrices = (torch.zeros(ranks * slots, 1, dim, dim, dtype=torch.float64) for _ in range(2))
        for rank, exchange in enumerate(exchanges):
            for slot, (start, end) in enumerate(exchange.sends):
                state, matrix = torch.zeros(dim, dim).double(), torch.eye(dim).double()
                for t in held[rank][start:end] if forward else held[rank][start:end][::-1]:
                    state, matrix = step[t] @ state + own[t], step[t] @ matrix
                local[rank * slots + slot, 0], matrices[rank * slots + slot, 0] = state, matrix
        for rank, exchange in enumerate(exchanges):
            states = scan(exchange.chains, local, _Matrices(matrices), len(exchange.receives))
            for state, (start, end) in zip(states, exchange.receives, strict=True):
                neighbour = held[rank][start] - 1 if forward else held[rank][end - 1] + 1
                torch.testing.assert_close(state[0], after[neighbour], rtol=1e-12, atol=1e-12)


def test_zigzag_is_the_default_and_balances_one_document() -> None:
    cost = ModelCost(0.0, 1.0, 0.0)
    for ranks in (2, 3, 8, 64):
        segments = choose_segments([0, 2 * ranks * 50], ranks, cost)
        assert segments.owners == (*range(ranks), *reversed(range(ranks)))


def _work_of_ranks(bounds: list[int], ranks: int, cost: ModelCost) -> tuple[np.ndarray, int]:
    segments = choose_segments(bounds, ranks, cost)
    pairs = np.diff(causal_pairs(np.asarray(bounds), np.asarray(segments.bounds)))
    owners = np.asarray(segments.owners)
    return np.array([pairs[owners == rank].sum() for rank in range(ranks)]), len(owners) // ranks


def test_as_many_segments_as_balance_needs_and_no_more_than_their_states_are_worth() -> None:
    # Many short documents, then one that fills the last quarter: zigzag leaves it on a few ranks.
    bounds = bounds_of([*[16] * 384, 2048])
    for ranks in (2, 3, 4, 8):
        bounds_here = bounds if 8192 % ranks == 0 else bounds_of([*[16] * 384, 2049])
        work, per_rank = _work_of_ranks(bounds_here, ranks, PAIRS_ONLY)
        assert per_rank > 2 and work.max() <= BALANCE * work.mean()
        fewer = ModelCost(0.0, 1.0, per_state=float(work.sum()))
        assert _work_of_ranks(bounds_here, ranks, fewer)[1] == 2, "states that cost more than they save are not taken"
        linear = ModelCost(1e6, 1.0, 0.0)
        assert _work_of_ranks(bounds_here, ranks, linear)[1] == 2, "attention that hardly counts is not balanced"


def test_the_fewest_segments_that_balance_are_taken() -> None:
    bounds, found = bounds_of([*[16] * 384, 2048]), set()
    for ranks, per_token in itertools.product((2, 4, 8), (0.0, 500.0, 2000.0, 5000.0, 8000.0)):
        for per_rank in itertools.count(2):
            segments = cut(bounds[-1], ranks, per_rank)
            pairs = np.diff(causal_pairs(np.asarray(bounds), segments))
            owners = by_work(pairs, np.diff(segments), ranks)
            work = per_token * bounds[-1] / ranks + np.bincount(owners, weights=pairs)
            if work.max() <= BALANCE * work.mean():
                break
        chosen = choose_segments(bounds, ranks, ModelCost(per_token, 1.0, 0.0))
        assert len(chosen.owners) == per_rank * ranks
        found.add(per_rank)
    assert found == set(range(2, 9))


def test_causal_pairs_are_counted_by_document() -> None:
    bounds = [0, 1, 4, 9]
    counted = np.cumsum([0, 1, 1, 2, 3, 1, 2, 3, 4, 5])
    assert causal_pairs(np.asarray(bounds), np.arange(10)).tolist() == counted.tolist()


def test_a_million_tokens_on_64_ranks_take_a_moment() -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(2048) - 1.5**2 / 2, 1.5, 700).astype(int) + 1
    lengths = lengths[np.cumsum(lengths) < 2**20]
    bounds = bounds_of([*lengths.tolist(), 2**20 - int(lengths.sum())])
    began = time.process_time()
    layout = SequenceLayout.build(
        bounds, context_parallel_size=64, context_parallel_rank=40, cost=ModelCost(1.0, 1.0, 0.0)
    )
    assert layout.state_plan and layout.ring_plan and len(layout.positions) == 2**14
    assert time.process_time() - began < 0.5, "seconds of processor time"
