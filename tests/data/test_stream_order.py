"""The order of documents in an epoch: a permutation by index."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_m1.data.stream.order import DocumentOrder


@given(documents=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 50), data=st.data())
def test_any_part_is_a_part_of_one_permutation(documents: int, seed: int, epoch: int, data: st.DataObject) -> None:
    order = DocumentOrder(documents, seed, epoch, "c")
    whole = order.at(0, documents).tolist()
    assert sorted(whole) == list(range(documents))
    start = data.draw(st.integers(0, documents))
    stop = data.draw(st.integers(start, documents))
    assert order.at(start, stop).tolist() == whole[start:stop]


def test_seed_epoch_and_content_each_give_another_order() -> None:
    orders = [DocumentOrder(1000, *rest) for rest in ((1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b"))]
    found = [order.at(0, 1000) for order in orders]
    for number, first in enumerate(found):
        for second in found[:number]:
            # One place in common is expected of two random permutations.
            assert np.count_nonzero(first == second) < 10


def test_the_order_is_kept_for_all_time() -> None:
    """Runs that go on depend on it."""
    assert DocumentOrder(10, 1234, 0, "c").at(0, 10).tolist() == [2, 8, 0, 6, 9, 5, 7, 4, 1, 3]
    far = DocumentOrder(10**12, 1234, 3, "c").at(999_999_999_990, 999_999_999_993)
    assert far.tolist() == [59_783_508_414, 53_353_096_825, 207_649_637_273]


@pytest.mark.parametrize("documents", [3, 4, 5])
def test_all_permutations_of_a_few_are_as_likely(documents: int) -> None:
    """Chi-squared over seeds; its deviation is the root of twice the degrees of freedom."""
    kinds, draws = math.factorial(documents), 2400
    seen = Counter(tuple(DocumentOrder(documents, seed, 0, "c").at(0, documents).tolist()) for seed in range(draws))
    expected = draws / kinds
    statistic = sum((seen[kind] - expected) ** 2 / expected for kind in seen) + expected * (kinds - len(seen))
    assert statistic < kinds - 1 + 5 * math.sqrt(2 * (kinds - 1))


def test_neighbours_are_scattered() -> None:
    """Of a million: no correlation of place and document, nor of one document and the next."""
    order = DocumentOrder(1_000_000, 7, 0, "c").at(0, 20_000)
    for first, second in ((np.arange(20_000), order), (order[:-1], order[1:])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(20_000)
    decile = np.bincount(order // 100_000, minlength=10)
    assert ((decile - 2000) ** 2 / 2000).sum() < 9 + 5 * math.sqrt(18)


def test_a_part_of_a_trillion_costs_what_it_has() -> None:
    tracemalloc.start()
    DocumentOrder(10**12, 1, 0, "c").at(5 * 10**11, 5 * 10**11 + 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
