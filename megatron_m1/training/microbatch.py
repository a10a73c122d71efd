"""From a pack to what one rank's forward pass takes: padded at its end, laid out, cut to the rank's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_m1.data.packed import PackedSample, pad_pack
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.balance import ModelCost
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.printing import counted
from megatron_m1.runtime.mesh import Mesh


@dataclass(frozen=True)
class MicroBatch:
    """What one rank's forward pass of one pack takes; n are the rank's tokens."""

    tokens: Tensor
    """int64 [1, n]."""
    labels: Tensor
    """int64 [1, n]."""
    loss_mask: Tensor
    """float32 [1, n]."""
    padding: Tensor | None
    """bool [1, n], true for the tokens that pad the pack, or None if none does. No router counts them."""
    params: PackedBatchParams
    """Carries the layout."""
    label_shares: Tensor
    """float32 [1, n]: those of the pack, which no rank could tell from its own tokens."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """[1, n, ...] by name: the pack's further tensors."""


def make_micro_batch(
    sample: PackedSample, mesh: Mesh, *, seq_length: int, pack_tokens: int, cost: ModelCost | None
) -> MicroBatch:
    """Lay ``sample`` out over the ranks of a context-parallel group and take this rank's part.

    Args:
        sample: of at most ``seq_length`` tokens, the same on all ranks of the group.
        mesh: gives the group and the device.
        seq_length: the configured length of a pack.
        pack_tokens: length to which the end is padded.
        cost: what the layout balances.

    Raises:
        ValueError: the pack is longer than configured, or its bounds are no bounds of it, or a further
            tensor has not a row for every token.
    """
    length = len(sample.tokens)
    if length > seq_length:
        raise ValueError(
            f"a pack has {counted(length, 'token')}, more than data.seq_length = {seq_length}: cut it or raise that"
        )
    if int(sample.cu_seqlens[-1]) != length:
        raise ValueError(
            f"cu_seqlens ends at {int(sample.cu_seqlens[-1])}, but the pack has {counted(length, 'token')}: its last "
            "bound must be the length"
        )
    padded = pad_pack(sample, pack_tokens)
    layout = SequenceLayout.build(
        padded.cu_seqlens,
        context_parallel_size=mesh.groups.cp.size(),
        context_parallel_rank=mesh.groups.cp.rank(),
        cost=cost,
    ).to(mesh.device)

    def local(x: Tensor) -> Tensor:
        # [pack_tokens, ...] -> [1, n, ...]: megatron-core's models take a batch dimension
        return layout.take_local(x).to(mesh.device, non_blocking=True)[None]

    padding = None
    if padded.real_tokens is not None:
        padding = local(torch.arange(pack_tokens) >= padded.real_tokens)
    return MicroBatch(
        local(padded.tokens),
        local(padded.labels),
        local(padded.loss_mask),
        padding,
        PackedBatchParams.of(layout),
        local(label_shares(padded)),
        {name: local(rows) for name, rows in padded.extra.items()},
    )


def label_shares(sample: PackedSample) -> Tensor:
    """Each token's share of the learnt labels of its document in a pack.

    Args:
        sample: n tokens.

    Returns:
        float32 [n]: ``loss_mask`` divided by its sum over the document, so that a document sums up to 1; 0 all over
        one without a label.
    """
    learnt = document_labels(sample)
    documents = torch.arange(len(learnt)).repeat_interleave(sample.cu_seqlens.long().diff())  # [n]: of each token
    return (sample.loss_mask.double() / torch.where(learnt > 0, learnt, 1.0)[documents]).float()


def document_labels(sample: PackedSample) -> Tensor:
    """float64 [documents]: the sum of ``loss_mask`` over each document of a pack."""
    before = torch.cat((torch.zeros(1, dtype=torch.float64), sample.loss_mask.double().cumsum(0)))  # [n + 1]
    return before[sample.cu_seqlens.long()].diff()
