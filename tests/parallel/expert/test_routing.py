"""What the benchmark of capacities simulates and records, and how it counts what is dropped."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from benchmarks.common.documents import log_normal_lengths
from benchmarks.common.routing import Skew, dropped, mean_dropped, record_choices, simulate_choices, waiting
from megatron_m1.data.packed import PackedSample
from megatron_m1.layers.router import Router
from megatron_m1.parallel.expert.quota import within_capacity
from megatron_m1.runtime.pool import WorkerPool
from tests.model.meshes import packs, run_config, start


def test_documents_fill_the_tokens() -> None:
    lengths = log_normal_lengths(100_000, 500.0, 1.0, np.random.default_rng(3))
    assert sum(lengths) == 100_000
    assert min(lengths) >= 1
    assert 350 < np.mean(lengths) < 700


def test_experts_are_liked_by_zipf() -> None:
    """One choice a token: shares are (e + 1) ** -s over their sum."""
    chosen = simulate_choices(60_000, 6, 1, Skew(1.0, 0.0), seed=1)
    weights = np.arange(1, 7) ** -1.0
    assert chosen.sum(1).eq(1).all()
    assert np.allclose(chosen.double().mean(0), weights / weights.sum(), atol=0.01)


def test_topics_make_stretches_of_tokens_differ() -> None:
    flat, topical = (
        waiting(simulate_choices(32_768, 8, 2, Skew(0.0, topic), seed=2), 512).double().std(0).mean()
        for topic in (0.0, 1.0)
    )
    assert topical > 5 * flat


def test_waiting_counts_blocks() -> None:
    chosen = torch.eye(3, dtype=torch.bool).repeat(3, 1)[:8]
    assert waiting(chosen, 4).tolist() == [[2, 1, 1], [1, 2, 1]]


def test_what_is_dropped_by_hand() -> None:
    """Two ranks of 4 tokens, one choice each, two experts, factor 1: 2 a rank and expert, or 4 of both ranks."""
    counts = torch.tensor([[4, 0], [1, 3]])
    found = dropped(counts, 4, 1, 1.0)
    assert (found.per_rank, found.shared) == (3 / 8, 1 / 8)
    assert dropped(counts, 4, 1, 2.0).per_rank == 0.0
    mean = mean_dropped(torch.cat([counts, torch.full((2, 2), 2), counts[:1]]), 2, 4, 1, 1.0)
    assert (mean.per_rank, mean.shared) == (3 / 16, 1 / 16)


def kept_of(rank: int, world_size: int, chosen: Tensor, factor: float) -> Any:
    """What the router of one rank keeps."""
    mine = chosen.chunk(world_size)[rank]
    assert dist.group.WORLD is not None
    return within_capacity(mine.float(), mine, topk=2, factor=factor, counted=None, group=dist.group.WORLD)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_the_router_drops_as_many(factor: float, workers: WorkerPool) -> None:
    chosen = simulate_choices(256, 8, 2, Skew(0.5, 1.0, mean_document=50.0), seed=4)
    kept = torch.cat(workers.run(kept_of, chosen, factor, world_size=2))
    assert dropped(waiting(chosen, 128), 128, 2, factor).shared == pytest.approx(1 - float(kept.sum() / chosen.sum()))


def recorded(rank: int, world_size: int, samples: list[PackedSample]) -> tuple[Tensor, Tensor]:
    """Of a model that is not trained: recorded choices, and those that the first router's own input says."""
    trained = start(run_config({}), world_size)
    model = trained.chunks[0].eval()
    router = next(module for module in model.modules() if isinstance(module, Router))
    seen: list[Tensor] = []
    handle = router.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    found = record_choices(model, samples)
    handle.remove()
    record_choices(model, samples[:1])
    logits = torch.cat([hidden.flatten(0, -2) for hidden in seen]) @ router.weight.detach().t()
    return found, torch.zeros_like(found[0]).scatter_(1, logits.topk(2).indices, True)


def test_recorded_choices_are_the_routers(workers: WorkerPool) -> None:
    samples = packs()[:2]
    (found,) = workers.run(recorded, samples, world_size=1)
    choices, first = found
    assert choices.shape == (8, sum(len(sample.tokens) for sample in samples), 4)
    assert choices.sum(2).eq(2).all()
    assert torch.equal(choices[0], first), "only while it records"
    assert any(not torch.equal(a, b) for a, b in pairwise(choices))
