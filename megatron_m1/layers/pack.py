"""What a micro-batch tells every layer: where its documents begin and end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_m1.layers.caches import Caches
from megatron_m1.parallel.layout import SequenceLayout


@dataclass
class PackedBatchParams(PackedSeqParams):
    """The one argument of megatron-core's layers that describes a pack, carrying our layout.

    ``qkv_format`` stays "sbhd" although the pack is one long row: "thd" would squeeze the batch dimension and bring
    Transformer Engine's rotary embedding, which assumes padded documents.
    """

    layout: SequenceLayout | None = None
    entered_states: dict[int, Tensor | None] = field(default_factory=dict)
    """By layer number, the lightning states that entered this rank's segments in a forward pass that will be
    recomputed: [M, heads, dim, dim], taken out again by the recomputation."""
    caches: Caches | None = None
    """For generation: each document goes on where its sequence's last pass ended."""

    @classmethod
    def of(cls, layout: SequenceLayout) -> PackedBatchParams:
        """Wrap ``layout`` for the forward pass of one micro-batch."""
        return cls(qkv_format="sbhd", layout=layout)


def batch_params(packed_seq_params: Any, ranks: int) -> PackedBatchParams:
    """Check that ``packed_seq_params`` is ours, and of a layout for as many ``ranks`` as share a pack.

    Raises:
        ValueError: the model was called without one, or with another mesh's.
    """
    if not isinstance(packed_seq_params, PackedBatchParams) or packed_seq_params.layout is None:
        raise ValueError(
            f"the model needs packed_seq_params=PackedBatchParams.of(layout), got {type(packed_seq_params).__name__}"
        )
    size = packed_seq_params.layout.context_parallel_size
    if size != ranks:
        raise ValueError(f"the context-parallel group has {ranks} ranks, the layout {size}: give the same")
    return packed_seq_params


def layout_of(params: PackedBatchParams) -> SequenceLayout:
    """Return the layout of checked ``params``."""
    assert params.layout is not None
    return params.layout
