"""Meshes with an expert capacity against one process that drops, by a plain loop, what their ranks would drop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.config import Config
from megatron_m1.data.packed import PackedSample
from megatron_m1.layers.router import Router
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.step import GRAD_NORM, LOSS
from tests.model.meshes import COPIES, PACKS, assemble, packs, run_config, start, step_with_gradients

FACTOR = 1.0
CP, TP, EP, ETP, G = (
    "context_parallel_size",
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "moe_token_groups",
)


def on_mesh(rank: int, world_size: int, config: Config) -> Any:
    """One global batch with every gradient."""
    result, parts = step_with_gradients(start(config, world_size), packs())
    return {"result": result, "parts": parts}


def drop_by_a_loop(owners: Iterator[list[int]], probs: Tensor, chosen: Tensor, factor: float, counted: Any) -> Tensor:
    """``Router._within_capacity`` of tokens that lie on several ranks: ``owners`` gives each micro-batch's."""
    owner = next(owners)
    tokens, experts = chosen.shape
    limit = -(-int(chosen.sum()) * factor // experts)
    kept = torch.zeros_like(chosen)
    for expert in range(experts):
        by_rank: dict[int, list[int]] = {rank: [] for rank in sorted(set(owner))}
        for token in range(tokens):
            if chosen[token, expert]:
                by_rank[owner[token]].append(token)
        total = sum(map(len, by_rank.values()))
        shares = {
            rank: len(mine) if total <= limit else int(len(mine) * limit // total) for rank, mine in by_rank.items()
        }
        for rank, mine in by_rank.items():
            if total > limit and sum(shares.values()) < limit and len(mine) * limit % total:
                shares[rank] += 1
        for rank, mine in by_rank.items():
            for token in sorted(mine, key=lambda t: -float(probs[t, expert]))[: shares[rank]]:
                kept[token, expert] = True
    assert bool((kept != chosen).any()), "nothing is dropped: the test would prove nothing"
    return kept


def alone(rank: int, world_size: int, config: Config, batch: list[PackedSample], owners: list[list[int]]) -> Any:
    """The same on one process."""
    trained = start(config, world_size)
    for module in trained.chunks[0].modules():
        if isinstance(module, Router):
            module._within_capacity = partial(drop_by_a_loop, iter(owners))  # type: ignore[method-assign]
    result, parts = step_with_gradients(trained, batch)
    return {"result": result, "parts": parts}


def joined(first: PackedSample, second: PackedSample) -> PackedSample:
    """Two packs as one: no document sees another."""
    ends = second.cu_seqlens[1:] + len(first.tokens)
    both = (first, second)
    return PackedSample(
        torch.cat([sample.tokens for sample in both]),
        torch.cat([sample.labels for sample in both]),
        torch.cat([sample.loss_mask for sample in both]),
        torch.cat([first.cu_seqlens, ends]),
    )


def split_owners(bounds: list[int], context: int, tensor: int) -> list[int]:
    """The rank of each of a pack's tokens: context ranks by the layout, then tensor ranks by sequence."""
    owner = [0] * bounds[-1]
    for rank in range(context):
        layout = SequenceLayout.build(bounds, context_parallel_size=context, context_parallel_rank=rank)
        local = layout.take_local(torch.arange(bounds[-1])).tolist()
        for place, token in enumerate(local):
            owner[token] = rank * tensor + place * tensor // len(local)
    return owner


MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2-ep2": (2, {CP: 2, EP: 2}),
    "tp2-ep2-etp1-groups": (2, {TP: 2, EP: 2, G: 2}),
    "cp2-groups": (2, {CP: 2, G: 3}),
}


@pytest.mark.parametrize("name", MESHES)
def test_ranks_of_a_pack_share_the_capacity(name: str, workers: WorkerPool) -> None:
    world_size, parallel = MESHES[name]
    owners = [split_owners(bounds, parallel.get(CP, 1), parallel.get(TP, 1)) for bounds in PACKS]
    by_rank = workers.run(on_mesh, run_config(parallel, moe_expert_capacity_factor=FACTOR), world_size=world_size)
    (truth,) = workers.run(alone, run_config({}, moe_expert_capacity_factor=FACTOR), packs(), owners, world_size=1)
    compare(by_rank, truth)


def test_data_parallel_ranks_share_the_capacity(workers: WorkerPool) -> None:
    """Two packs at once on two ranks are one pack of two on one process; aux losses, which are per pack, are off."""
    model: dict[str, Any] = {"moe_expert_capacity_factor": FACTOR, "moe_aux_loss_coeff": 0.0}
    by_rank = workers.run(on_mesh, run_config({EP: 2, G: 2}, **model), world_size=2)
    batch = packs()
    pairs = [joined(batch[i], batch[i + 1]) for i in (0, 2)]
    length = len(batch[0].tokens)
    config = run_config({}, documents=[[0, 2 * length]] * 2, **model)
    (truth,) = workers.run(alone, config, pairs, [[0] * length + [1] * length] * 2, world_size=1)
    compare(by_rank, truth)


def compare(by_rank: list[Any], truth: Any) -> None:
    expected = assemble([truth["parts"]])
    gradients = assemble([result["parts"] for result in by_rank])
    assert gradients.keys() == expected.keys()
    for key, wanted in expected.items():
        assert (gradients[key] - wanted).norm() <= COPIES * wanted.norm(), key
    for result in by_rank:
        for figure in (LOSS, GRAD_NORM):
            value = truth["result"].figures[figure]
            assert result["result"].figures[figure] == pytest.approx(value, rel=COPIES), figure.name
