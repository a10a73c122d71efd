"""One process that routes, and drops, what the ranks of a mesh would: it is told which rank has which token.

Data-parallel ranks route their packs at once; here these are one pack, in which no document sees another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_m1.config import Config
from megatron_m1.data.packed import PackedSample, pad_pack
from megatron_m1.layers.router import Router
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.plan.flops import layout_cost
from megatron_m1.training.step import StepResult
from megatron_m1.training.trained_model import TrainedModel
from tests.model.meshes import Part, start, step_with_gradients


@dataclass(frozen=True)
class Partition:
    """How the tokens of a stage lie on its ranks: tensor ranks are neighbours, then come context and data ranks."""

    data: int = 1
    context: int = 1
    tensor: int = 1

    def pack_tokens(self, length: int) -> int:
        """Tokens of a pack with the padding at its end."""
        ranks = self.context * self.tensor
        return -(-length // ranks) * ranks

    def tokens(self, pack: PackedSample, context_rank: int, config: Config) -> list[int]:
        """Those of a pack that a context rank holds, in its order; padding counts from the pack's length on."""
        padded = pad_pack(pack, self.pack_tokens(len(pack.tokens)))
        layout = SequenceLayout.build(
            padded.cu_seqlens,
            context_parallel_size=self.context,
            context_parallel_rank=context_rank,
            cost=layout_cost(config.model),
        )
        found: list[int] = layout.take_local(torch.arange(len(padded.tokens))).tolist()
        return found

    def owners(self, packs: list[PackedSample], config: Config) -> list[int]:
        """The rank of every token of packs that as many data-parallel ranks route at once."""
        owners = []
        for data_rank, pack in enumerate(packs):
            mine = [0] * len(pack.tokens)
            for rank in range(self.context):
                local = self.tokens(pack, rank, config)
                for place, token in enumerate(local):
                    if token < len(mine):
                        context_rank = data_rank * self.context + rank
                        mine[token] = context_rank * self.tensor + place * self.tensor // len(local)
            owners += mine
        return owners


def joined(*packs: PackedSample) -> PackedSample:
    """Several packs as one: no document sees another."""
    bounds = [torch.zeros(1, dtype=torch.int32)]
    for pack in packs:
        bounds.append(pack.cu_seqlens[1:] + bounds[-1][-1])
    tokens, labels, masks = (
        torch.cat([getattr(pack, name) for pack in packs]) for name in ("tokens", "labels", "loss_mask")
    )
    return PackedSample(tokens, labels, masks, torch.cat(bounds))


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


def balance_by_parts(
    router: Router, parts: int, probs: Tensor, scores: Tensor, chosen: Tensor, with_padding_mask: bool = False
) -> Tensor:
    """``Router._apply_aux_loss`` of packs joined to one: the mean of their losses, by the formula."""
    coefficient = router.get_aux_loss_coeff("aux_loss")
    size, experts = len(probs) // parts, probs.shape[1]
    losses = []
    for score, choice in zip(scores.split(size), chosen.split(size), strict=True):
        shares = choice.float().mean(0) / router.topk  # of all choices, by expert
        losses.append(experts * (shares * score.mean(0)).sum())
    mean = coefficient * torch.stack(losses).mean()
    return router.attach_and_log_load_balancing_loss(
        probs, coefficient, mean, "load_balancing_loss", router.tp_cp_group
    )


@dataclass
class Outcome:
    """Of one rank."""

    result: StepResult
    parts: dict[str, Part]
    outputs: list[Tensor]
    """Of the last stage: the loss of every token that the rank has, by micro-batch."""
    data_rank: int
    context_rank: int


def outcome(trained: TrainedModel, batch: list[PackedSample]) -> Outcome:
    """One step on a global batch, with every gradient and the model's outputs."""
    outputs: list[Tensor] = []
    last = trained.chunks[-1].module
    handle = None
    if last.post_process:
        handle = last.register_forward_hook(lambda module, given, output: outputs.append(output.detach().flatten()))
    result, parts = step_with_gradients(trained, batch)
    if handle is not None:
        handle.remove()
    return Outcome(result, parts, outputs, trained.mesh.data_parallel_rank, trained.mesh.groups.cp.rank())


def on_mesh(rank: int, world_size: int, config: Config, batch: list[PackedSample]) -> Outcome:
    """On every rank of a mesh."""
    config.optimizer.clip_grad = 0.0  # every rank would clip its own shard of the gradients that are compared
    return outcome(start(config, world_size), batch)


def outputs_in_order(by_rank: list[Outcome], partition: Partition, batch: list[PackedSample], config: Config) -> Tensor:
    """The loss of every token of the global batch [tokens], pack after pack, by the ranks that have them."""
    places = {id(pack): index for index, pack in enumerate(batch)}
    found = [torch.full((len(pack.tokens),), torch.nan) for pack in batch]
    for rank in by_rank:
        for pack, losses in zip(batch[rank.data_rank :: partition.data], rank.outputs, strict=bool(rank.outputs)):
            tokens = torch.tensor(partition.tokens(pack, rank.context_rank, config))
            counted = tokens < len(pack.tokens)
            found[places[id(pack)]][tokens[counted]] = losses[counted]
    return torch.cat(found)


def alone(
    rank: int, world_size: int, config: Config, batch: list[PackedSample], partition: Partition | None
) -> Outcome:
    """On one process, as if ``partition``'s ranks had the tokens; ``batch`` is dealt to its data ranks in turn."""
    config.optimizer.clip_grad = 0.0
    if partition is None:
        return outcome(start(config, world_size), batch)
    size = partition.data
    together = [batch[first : first + size] for first in range(0, len(batch), size)]
    owners = [partition.owners(packs, config) for packs in together]
    packs = [joined(*each) for each in together]
    config.data.seq_length, config.train.global_batch_size = len(packs[0].tokens), len(packs)
    trained = start(config, world_size)
    for module in trained.chunks[0].modules():
        if isinstance(module, Router):
            module._within_capacity = partial(drop_by_a_loop, iter(owners))  # type: ignore[method-assign]
            module._apply_aux_loss = partial(balance_by_parts, module, size)
    return outcome(trained, packs)
