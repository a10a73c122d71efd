"""The layout of a packed sequence: positions, bounds and ranges against counting token by token."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m1.parallel.layout import SequenceLayout

LENGTHS = st.lists(st.integers(min_value=1, max_value=50), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, as_tensor=st.booleans())
def test_random_packs(lengths: list[int], as_tensor: bool) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    layout = SequenceLayout.build(torch.tensor(bounds, dtype=torch.int32) if as_tensor else bounds)
    assert layout.positions.tolist() == [position for length in lengths for position in range(length)]
    assert layout.local_cu_seqlens.tolist() == bounds
    assert layout.local_document_bounds == layout.document_bounds == tuple(bounds)
    assert layout.segments == ((0, sum(lengths)),)
    assert layout.total_tokens == layout.local_tokens == sum(lengths)
    assert layout.max_document_length == max(lengths)


def test_dtypes_and_device() -> None:
    layout = SequenceLayout.build([0, 3, 10])
    assert layout.positions.dtype == torch.int64 and layout.local_cu_seqlens.dtype == torch.int32
    assert layout.positions is layout.positions, "built once"
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.positions.is_meta and moved.positions.shape == (10,) and moved.local_cu_seqlens.is_meta
    assert not layout.positions.is_meta


def test_equal_packs_have_equal_layouts() -> None:
    assert SequenceLayout.build([0, 3, 10]) == SequenceLayout.build(torch.tensor([0, 3, 10]))
    assert SequenceLayout.build([0, 3, 10]) != SequenceLayout.build([0, 4, 10])


BAD_CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "start": ([1, 4], {}, r"begins \[1, 4\]"),
    "no document": ([0], {}, r"begins \[0\]"),
    "nothing": ([], {}, r"begins \[\]"),
    "empty document": ([0, 3, 3, 5], {}, r"document 1 at \[3, 3\)"),
    "falling": ([0, 3, 2], {}, r"document 1 at \[3, 2\)"),
    "fractions": ([0, 2.5], {}, "float"),
    "tensor dtype": (torch.tensor([0.0, 3.0]), {}, "torch.float32"),
    "tensor rank": (torch.tensor([[0, 3]]), {}, r"\[1, 2\]"),
    "tensor device": (torch.zeros(3, dtype=torch.int32, device="meta"), {}, "on meta"),
    "size": ([0, 3], {"context_parallel_size": 0}, "context_parallel_size is 0"),
    "not divided": ([0, 7], {"context_parallel_size": 2}, "7 tokens, not a multiple of context_parallel_size 2: .* 8$"),
    "too many ranks": ([0, 3, 4], {"context_parallel_size": 4}, "2 segments for at most 2 ranks"),
    "rank": ([0, 3], {"context_parallel_rank": 1}, "context_parallel_rank is 1 of 1"),
    "no int": ([0, 4], {"context_parallel_size": 2.0}, "context_parallel_size is 2.0: give an int"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments_are_named(name: str) -> None:
    cu_seqlens, ranks, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message) as raised:
        SequenceLayout.build(cu_seqlens, **ranks)
    assert "\n" not in str(raised.value)
