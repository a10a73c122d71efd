"""Which experts tokens go to, simulated or recorded from a checkpoint, and how many choices a capacity drops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import megatron_m1
from benchmarks.common.documents import log_normal_lengths
from megatron_m1.data.packed import PackedSample
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.layers.router import Router
from megatron_m1.parallel.expert.quota import capacity, share_capacity
from megatron_m1.parallel.layout import SequenceLayout

SIGMA = 1.5
"""Of the logarithm of documents' lengths."""


@dataclass(frozen=True)
class Skew:
    """How unevenly simulated tokens choose."""

    zipf: float
    """Expert e is liked in proportion to (e + 1) ** -zipf; 0 likes all alike."""
    topic: float
    """Standard deviation of what each document adds to the logarithm of every expert's weight."""
    mean_document: float = 2048.0
    """Tokens; lengths are log-normal."""


def simulate_choices(tokens: int, experts: int, topk: int, skew: Skew, seed: int) -> Tensor:
    """Experts of a stream of documents, each token's drawn without replacement by their weights.

    Returns:
        bool [tokens, experts], ``topk`` true in each row.
    """
    draw = np.random.default_rng(seed)
    liked = -skew.zipf * np.log(np.arange(1, experts + 1))
    chosen = torch.zeros(tokens, experts, dtype=torch.bool)
    start = 0
    for length in log_normal_lengths(tokens, skew.mean_document, SIGMA, draw):
        weights = liked + skew.topic * draw.standard_normal(experts)
        # The largest of weights with Gumbel noise are such a draw.
        scores = weights + draw.gumbel(size=(length, experts))
        best = torch.from_numpy(np.argpartition(-scores, topk - 1, axis=1)[:, :topk].copy())
        chosen[start : start + length].scatter_(1, best, True)
        start += length
    return chosen


def waiting(chosen: Tensor, block: int) -> Tensor:
    """Tokens that wait for each expert: [tokens, experts] bool -> [tokens // block, experts] int64, ``block`` a row."""
    whole = len(chosen) // block * block
    return chosen[:whole].view(-1, block, chosen.shape[1]).sum(1)


@dataclass(frozen=True)
class Dropped:
    """Shares of all choices that are dropped."""

    per_rank: float
    """Each rank gives its experts the capacity of its own tokens, as megatron-core does."""
    shared: float
    """The capacity of all ranks' tokens is dealt out to those that have some waiting (``parallel/expert/quota.py``)."""


def dropped(counts: Tensor, tokens: int, topk: int, factor: float) -> Dropped:
    """What a capacity factor drops.

    Args:
        counts: [ranks, experts] int64, tokens of each rank that chose each expert, before any is dropped.
        tokens: of each rank.
        topk: experts that each token chose.
        factor: capacity over the balanced share.
    """
    ranks, experts = counts.shape
    own = counts.clamp_max(capacity(tokens, topk, experts, factor))
    dealt = share_capacity(counts, capacity(ranks * tokens, topk, experts, factor))
    total = int(counts.sum())
    return Dropped(1 - int(own.sum()) / total, 1 - int(dealt.sum()) / total)


def mean_dropped(counts: Tensor, ranks: int, tokens: int, topk: int, factor: float) -> Dropped:
    """Mean over all runs of ``ranks`` rows of ``counts`` [micro-batches, experts] that do not overlap."""
    whole = len(counts) // ranks * ranks
    found = [dropped(part, tokens, topk, factor) for part in counts[:whole].split(ranks)]
    return Dropped(*(sum(getattr(one, side) for one in found) / len(found) for side in ("per_rank", "shared")))


def _through(model: nn.Module) -> Callable[[PackedSample], object]:
    def run(sample: PackedSample) -> object:
        params = PackedBatchParams.of(SequenceLayout.build(sample.cu_seqlens))
        return model(sample.tokens[None], None, None, packed_seq_params=params)

    return run


def record_choices(
    model: nn.Module, samples: Iterable[PackedSample], run: Callable[[PackedSample], object] | None = None
) -> Tensor:
    """Run packs through a whole model on this process, and keep every router's choices.

    Args:
        model: whose routers are looked at.
        samples: packs.
        run: what takes a pack through the model; None calls it as the training loop does.

    Returns:
        bool [layers, tokens, experts], tokens of all packs end to end, before any is dropped by capacity.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    kept: list[list[Tensor]] = [[] for _ in routers]

    def keep(choices: list[Tensor]) -> Any:
        # A router returns probabilities and what it has chosen.
        return lambda module, arguments, result: choices.append(result[1].clone())

    handles = [router.register_forward_hook(keep(choices)) for router, choices in zip(routers, kept, strict=True)]
    try:
        with torch.no_grad():
            for sample in samples:
                (run or _through(model))(sample)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.cat(choices) for choices in kept])


def choices_of_checkpoint(path: Path, packs: int) -> tuple[Tensor, int]:
    """Choices of a run's or checkpoint's routers on held-out packs.

    Args:
        path: of a run folder or checkpoint that has validation data.
        packs: of ``data.seq_length`` tokens.

    Returns:
        ``record_choices``, and the experts that each token chose.
    """
    model = megatron_m1.load(path, device="cpu", dtype="fp32")
    samples = megatron_m1.packed_data(path, split="validation", num_samples=packs)
    return record_choices(model.module, samples, model.logits), model.config.model.moe_router_topk
