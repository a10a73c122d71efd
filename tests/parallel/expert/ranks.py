"""What the tests of expert layers run on every rank, and the one process that they are held against."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.common.expert_ranks import process_groups
from megatron_m1.kernels.expert_mlp.one_by_one import OneByOne
from megatron_m1.parallel.expert.layer import Call, expert_layer
from megatron_m1.parallel.expert.links import GroupLink, Links
from megatron_m1.parallel.expert.plan import plan_exchange


@dataclass(frozen=True)
class Case:
    """One layer and the tokens of every rank."""

    expert_ranks: int
    tensor_ranks: int
    groups: int
    tokens: tuple[int, ...]
    """Of each rank."""
    experts: int = 4
    topk: int = 2
    hidden: int = 10
    ffn: int = 6
    dtype: torch.dtype = torch.float64
    to_one: bool = False
    """All tokens go to the last expert (and to the one before it)."""
    drop: float = 0.0
    """Share of choices that are dropped, at random."""
    seed: int = 0
    recompute: bool = False

    @property
    def ranks(self) -> int:
        """Of the whole layer."""
        return self.expert_ranks * self.tensor_ranks

    def generator(self) -> torch.Generator:
        """Of the case's numbers."""
        return torch.Generator().manual_seed(1000 + self.seed)

    def weights(self) -> list[Tensor]:
        """fc1 [2 ffn, hidden] and fc2 [hidden, ffn] of every expert in turn."""
        draw = self.generator()
        shapes = [(2 * self.ffn, self.hidden), (self.hidden, self.ffn)] * self.experts
        return [(torch.randn(s, generator=draw, dtype=torch.float64) / s[1] ** 0.5).to(self.dtype) for s in shapes]

    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden [n, hidden], probs [n, E] (zero where not chosen), routing map [n, E], gradient [n, hidden]."""
        draw = torch.Generator().manual_seed(7 * self.seed + rank)
        n = self.tokens[rank]
        hidden, grad = (torch.randn(n, self.hidden, generator=draw, dtype=torch.float64) for _ in range(2))
        scores = torch.rand(n, self.experts, generator=draw, dtype=torch.float64)
        if self.to_one:
            scores[:, -self.topk :] += 2
        chosen = torch.zeros(n, self.experts, dtype=torch.bool)
        chosen.scatter_(1, scores.topk(self.topk).indices, True)
        chosen &= torch.rand(n, self.experts, generator=draw, dtype=torch.float64) >= self.drop
        return hidden.to(self.dtype), (scores * chosen).to(self.dtype), chosen, grad.to(self.dtype)


@dataclass
class Outcome:
    """Of one rank, or of all."""

    output: Tensor
    hidden: Tensor
    probs: Tensor
    weights: list[Tensor] = field(default_factory=list)


def shard(weights: list[Tensor], case: Case, expert_rank: int, tensor_rank: int) -> list[Tensor]:
    """A rank's experts, its rows of gate and up and its columns of down."""
    held, part = case.experts // case.expert_ranks, case.ffn // case.tensor_ranks
    mine = weights[2 * held * expert_rank : 2 * held * (expert_rank + 1)]
    rows = slice(part * tensor_rank, part * (tensor_rank + 1))
    found = []
    for fc1, fc2 in zip(mine[::2], mine[1::2], strict=True):
        gate, up = fc1.chunk(2)
        found += [torch.cat([gate[rows], up[rows]]), fc2[:, rows].contiguous()]
    return found


def run_rank(rank: int, world_size: int, case: Case) -> Outcome:
    """Forward and backward of this rank's tokens."""
    ranks = process_groups(case.expert_ranks, case.tensor_ranks, rank)
    hidden, probs, chosen, grad = case.inputs(rank)
    weights = shard(case.weights(), case, rank // case.tensor_ranks, rank % case.tensor_ranks)
    leaves = [x.requires_grad_() for x in (hidden, probs, *weights)]
    plan = plan_exchange(chosen, case.groups, ranks)
    links = Links(*(None if group is None else GroupLink(group) for group in (ranks.expert, ranks.tensor)))
    output = expert_layer(hidden, probs, weights, Call(plan, links, OneByOne(), case.recompute))
    grads = torch.autograd.grad(output, leaves, grad)
    return Outcome(output.detach(), grads[0], grads[1], list(grads[2:]))


def truth(case: Case) -> Outcome:
    """All ranks' tokens on one process, token by token in float64 as the formula stands; weights' gradients whole."""
    inputs = [[x.double() if x.is_floating_point() else x for x in case.inputs(r)] for r in range(case.ranks)]
    hidden, probs, chosen, grad = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    weights = [w.double() for w in case.weights()]
    leaves = [x.requires_grad_() for x in (hidden, probs, *weights)]
    output = torch.zeros_like(hidden)
    for expert in range(case.experts):
        fc1, fc2 = weights[2 * expert : 2 * expert + 2]
        gate, up = (hidden @ fc1.t()).chunk(2, dim=1)
        swish = gate / (1 + (-gate).exp())
        share = probs[:, expert, None] * chosen[:, expert, None]
        output = output + ((swish * up * share) @ fc2.t())
    grads = torch.autograd.grad(output, leaves, grad)
    return Outcome(output.detach(), grads[0], grads[1], list(grads[2:]))
