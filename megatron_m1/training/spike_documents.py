"""The documents of a batch by loss, in a file: where to look for what made the gradient large."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_m1.data.packed import DocumentPiece, PackedSample
from megatron_m1.data.tokenizers.load import Tokenizer
from megatron_m1.files import write_atomically
from megatron_m1.runtime.mesh import Mesh
from megatron_m1.training.figures import Figure
from megatron_m1.training.microbatch import MicroBatch
from megatron_m1.training.step import evaluate
from megatron_m1.training.trained_model import TrainedModel

FOLDER = "spikes"
TEXT_TOKENS = 48
"""Tokens of a piece's beginning that its line spells out."""


class _PieceLosses:
    """An objective that adds up the losses of every piece of every pack, and trains nothing."""

    figures: tuple[Figure, ...] = ()

    def __init__(self, ends: list[Tensor], device: torch.device) -> None:
        """``ends``: of every pack int64 [pieces], the tokens of the pack before the end of each."""
        self._ends = iter(ends)
        pieces = sum(map(len, ends))
        self._first = 0
        # Sum of losses and number of predicted tokens; greatest loss. This rank's tokens only.
        self.sums = torch.zeros(2, pieces, dtype=torch.float64, device=device)
        self.greatest = torch.full((pieces,), -torch.inf, dtype=torch.float64, device=device)

    def weight(self, sample: PackedSample) -> Tensor:
        return sample.loss_mask.sum()

    def total(self, losses: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[Figure, Tensor]]:
        layout = batch.params.layout
        assert layout is not None
        # The schedule asks pack by pack, in their order.
        ends = next(self._ends)
        tokens = torch.cat([torch.arange(start, end) for start, end in layout.segments])
        piece = torch.bucketize(tokens, ends, right=True).to(losses.device)
        counts = (batch.loss_mask[0] != 0) & (piece < len(ends))  # What pads a pack is in no piece.
        piece, values = self._first + piece[counts], losses[0, counts].double()
        self.sums.index_add_(1, piece, torch.stack([values, torch.ones_like(values)]))
        self.greatest.scatter_reduce_(0, piece, values, "amax")
        self._first += len(ends)
        return (losses.float() * batch.loss_mask).sum(), {}


def batch_documents(
    trained: TrainedModel, samples: list[PackedSample], pieces: list[list[DocumentPiece]], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Run the model over a global batch and tell the loss of every document's piece. Collective.

    Args:
        trained: as it is now.
        samples: this rank's packs of the batch.
        pieces: what each of them is made of.
        tokenizer: spells the beginnings.

    Returns:
        On rank 0 a record a piece: ``corpus``, ``document``, ``offset``, ``tokens`` (see ``DocumentPiece``),
        ``predicted`` (tokens with a loss), ``loss`` (their mean, nats) and ``max_loss``, both None without any, and
        ``text``; the greatest mean loss first, what is not finite before that. On other ranks nothing.
    """
    ends = [torch.tensor([piece.end for piece in pack], dtype=torch.int64) for pack in pieces]
    losses = _PieceLosses(ends, trained.mesh.device)
    evaluate(replace(trained, objective=losses), samples)
    if not trained.mesh.counts_loss:
        losses.sums.zero_()
        losses.greatest.fill_(-torch.inf)
    groups = trained.mesh.groups
    # Over all ranks that share these packs, so that those of the first stage know, of which one is rank 0.
    for group in (groups.cp, groups.mp):
        dist.all_reduce(losses.sums, group=group)
        dist.all_reduce(losses.greatest, op=dist.ReduceOp.MAX, group=group)
    records = list(_records(samples, pieces, losses, tokenizer))
    return sorted(_gathered(records, trained.mesh), key=_order)


def _records(
    samples: list[PackedSample], pieces: list[list[DocumentPiece]], losses: _PieceLosses, tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    both = zip(losses.sums.T.tolist(), losses.greatest.tolist(), strict=True)
    for sample, pack in zip(samples, pieces, strict=True):
        for piece in pack:
            (total, predicted), greatest = next(both)
            yield {
                "corpus": piece.corpus,
                "document": piece.document,
                "offset": piece.offset,
                "tokens": piece.end - piece.start,
                "predicted": int(predicted),
                "loss": total / predicted if predicted else None,
                "max_loss": greatest if predicted else None,
                "text": tokenizer.decode(
                    sample.tokens[piece.start : min(piece.end, piece.start + TEXT_TOKENS)].tolist()
                ),
            }


def _gathered(records: list[dict[str, Any]], mesh: Mesh) -> list[dict[str, Any]]:
    """The records of all data-parallel ranks, on rank 0. A replica speaks through its first rank."""
    groups = mesh.groups
    if any(group.rank() for group in (groups.tp, groups.cp, groups.pp)):
        return []
    parts: list[Any] | None = [None] * groups.dp.size() if mesh.rank == 0 else None
    dist.gather_object(records, parts, dst=0, group=groups.dp)
    return [record for part in parts or [] for record in part]


def _order(record: dict[str, Any]) -> tuple[Any, ...]:
    loss = record["loss"]
    if loss is None:
        rank: tuple[float, ...] = (2,)
    else:
        rank = (1, -loss) if math.isfinite(loss) else (0,)
    return (*rank, record["corpus"], record["document"], record["offset"])


def documents_path(folder: Path, step: int, number: int) -> Path:
    """File of the run's spike ``number``, at ``step``: a run that goes back may come to a step again."""
    return folder / FOLDER / f"step_{step:08d}_spike_{number}.jsonl"


def write_documents(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a JSON object a line; a number that is not finite becomes null, because JSON has no NaN. Atomic.

    Raises:
        OSError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({name: _finite(value) for name, value in r.items()}, ensure_ascii=False) for r in records)
    # A tokenizer may give halves of characters.
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
