"""Calls whose layout is not that of the tokens or of the ranks: one clear line instead of wrong rows."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

from megatron_m1.parallel.lasp import lasp_attention
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.parallel.ring_attention import ring_attention


def test_a_layout_for_other_ranks(alone: dist.ProcessGroup) -> None:
    x, slopes = torch.ones(4, 2, 8), torch.ones(2)
    layout = SequenceLayout.build([0, 8], context_parallel_size=2)
    message = "^the group has 1 ranks, the layout 2: give the same$"
    for group in (None, alone):
        with pytest.raises(ValueError, match=message):
            lasp_attention(x, x, x, slopes, layout, group)
    with pytest.raises(ValueError, match=message):
        ring_attention(x, x, x, layout, alone)


@pytest.mark.parametrize("tokens", [3, 5])
def test_a_layout_of_other_tokens(tokens: int, alone: dist.ProcessGroup) -> None:
    x, layout = torch.ones(tokens, 2, 8), SequenceLayout.build([0, 1, 4])
    with pytest.raises(ValueError, match=f"^q has {tokens} tokens, the layout's rank 4: give the rank's own$"):
        ring_attention(x, x, x, layout, alone)
    with pytest.raises(ValueError, match=str(tokens)):
        lasp_attention(x, x, x, torch.ones(2), layout, alone)
