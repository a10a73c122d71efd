"""Losses of tokens added up by cell on any mesh: a cell is whatever some tokens have in common, such as their source.

No logits are kept, nor any loss of a token: the last stage adds each pack's up where it has them, in fp64, and one
all-reduce at the end adds up the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_m1.data.packed import PackedSample, Packs
from megatron_m1.evaluation.model import EvaluatedModel
from megatron_m1.training.microbatch import MicroBatch
from megatron_m1.training.step import run_schedule

CELLS = "cells"
"""Name of the further tensor of a pack that says where its losses go: int64 [n, groupings], or ``NOWHERE``."""
NOWHERE = -1
PACKS_PER_STAGE = 4
"""Micro-batches of a rank between two reports of progress, a stage: a fifth of the time is the pipeline's bubble."""


@dataclass(frozen=True)
class Sums:
    """By cell, on the CPU, the same on every rank."""

    loss: Tensor
    """fp64 [cells], nats: sum of the negative log-likelihoods of its labels."""
    tokens: Tensor
    """int64 [cells]: its labels."""
    hits: Tensor
    """int64 [cells]: those that were the most likely token."""
    chosen: Tensor
    """int64 [cells]: sum of the most likely tokens' ids; of a cell with one label, that token."""


def with_cells(pack: PackedSample, cells: Tensor) -> PackedSample:
    """Return ``pack`` with the cells of its labels, int64 [n, groupings]."""
    return replace(pack, extra={CELLS: cells}, padding={CELLS: float(NOWHERE)})


class _Account:
    """What one rank has added up."""

    def __init__(self, cells: int, model: EvaluatedModel) -> None:
        self._counts = model.mesh.counts_loss
        self.sums = torch.zeros(4, cells, dtype=torch.float64, device=model.mesh.device)

    def add(self, found: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Add one rank's part of a pack, as ``run_schedule`` asks for it."""
        losses, choice = found
        if self._counts:
            values = torch.stack((losses, torch.ones_like(losses), choice == batch.labels[0], choice))
            for cells in batch.extra[CELLS][0].unbind(dim=1):
                counts = cells != NOWHERE
                self.sums.index_add_(1, cells[counts], values[:, counts])
        # The schedule's own sum and count of tokens.
        return losses.new_zeros(()), losses.new_zeros((), dtype=torch.int), losses.new_zeros(())


@torch.no_grad()
def sums_by_cell(
    model: EvaluatedModel, packs: Packs | Sequence[PackedSample], cells: int, advance: Callable[[int], None]
) -> Sums:
    """Run packs through the model and add up the losses of their labels. Collective.

    Any number of packs is dealt over the data-parallel ranks: where it is no multiple, some run one again for nothing.

    Args:
        model: on any mesh.
        packs: the same on every rank, each with ``CELLS``.
        cells: how many there are.
        advance: called with the number of packs that are done, since the last call.
    """
    mesh, parallel = model.mesh, model.config.parallel
    account = _Account(cells, model)
    size, stages = mesh.data_parallel_size, parallel.pipeline_model_parallel_size
    # Interleaved stages take whole rounds.
    multiple = stages if parallel.virtual_pipeline_model_parallel_size else 1
    for start in range(0, len(packs), size * stages * PACKS_PER_STAGE):
        stop = min(len(packs), start + size * stages * PACKS_PER_STAGE)
        each = math.ceil(math.ceil((stop - start) / size) / multiple) * multiple
        mine = [start + mesh.data_parallel_rank + size * turn for turn in range(each)]
        samples = [packs[index] if index < stop else _for_nothing(packs[start]) for index in mine]
        run_schedule(model, samples, account.add, forward_only=True, with_choices=True)
        advance(stop - start)
    dist.all_reduce(account.sums)
    loss, *counts = account.sums.cpu()
    tokens, hits, chosen = (count.round().long() for count in counts)
    return Sums(loss, tokens, hits, chosen)


def _for_nothing(pack: PackedSample) -> PackedSample:
    return with_cells(pack, torch.full_like(pack.extra[CELLS], NOWHERE))
