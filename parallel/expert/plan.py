"""Which token goes where: the exchanges of one layer's token groups, from the router's choices of all ranks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The process groups of one layer's experts; None stands for one rank."""

    expert: dist.ProcessGroup | None
    """EP: ranks that hold different experts (or the same shard of them)."""
    tensor: dist.ProcessGroup | None
    """ETP: ranks that share each expert's matrices."""
    both: dist.ProcessGroup | None
    """EP x ETP, in which ETP ranks are neighbours."""

    @property
    def expert_size(self) -> int:
        """Ranks of EP."""
        return 1 if self.expert is None else self.expert.size()

    @property
    def tensor_size(self) -> int:
        """Ranks of ETP."""
        return 1 if self.tensor is None else self.tensor.size()


@dataclass(frozen=True)
class Chunked:
    """Rows that arrive as chunks, one per (ETP rank, EP rank, ..., local expert), and their order by expert."""

    order: Tensor
    """[rows] int64: where each row, sorted by expert, lies among those that arrived."""
    arrived: int
    """Rows of the buffer that arrives, ETP ranks' parts padded to the longest."""
    part: int
    """Rows of each ETP rank's part, with padding."""


@dataclass(frozen=True)
class GroupPlan:
    """One token group on one rank."""

    tokens: Tensor
    """[pairs] int64: this rank's tokens, once for each expert that they go to, sorted by expert."""
    experts: Tensor
    """[pairs] int64: the expert of each."""
    sends: list[int]
    """Pairs to each EP rank."""
    receives: list[int]
    """Pairs from each EP rank."""
    rows: Chunked
    counts: list[int]
    """Rows of each local expert, of all ranks."""

    @property
    def received(self) -> int:
        """Pairs that this rank receives."""
        return sum(self.receives)


@dataclass(frozen=True)
class ScalesPlan:
    """All groups' router probabilities, which travel at once."""

    to_send: Tensor
    """[pairs] int64: where the pair that is sent at each place lies among all groups' pairs, group by group."""
    sends: list[int]
    receives: list[int]
    rows: tuple[Chunked, ...]
    """A group's own, in the one buffer of all groups."""


@dataclass(frozen=True)
class ExpertPlan:
    """Of one layer, micro-batch and rank."""

    groups: tuple[GroupPlan, ...]
    scales: ScalesPlan


def group_bounds(num_tokens: int, groups: int) -> list[tuple[int, int]]:
    """Cut tokens into groups of equal sizes (one more in the first ones); fewer tokens than groups leave some empty."""
    size, more = divmod(num_tokens, groups)
    ends = list(itertools.accumulate(size + (index < more) for index in range(groups)))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _gather_counts(counts: Tensor, ranks: Ranks) -> Tensor:
    """[G, E] of this rank -> [ETP, EP, G, E] of all."""
    if ranks.both is None:
        return counts[None, None]
    received = counts.new_empty(ranks.both.size() * counts.shape[0], counts.shape[1])
    dist.all_gather_into_tensor(received, counts.contiguous(), group=ranks.both)
    # [EP x ETP x G, E] -> [EP, ETP, G, E] -> [ETP, EP, G, E]
    return received.view(ranks.expert_size, ranks.tensor_size, *counts.shape).transpose(0, 1)


def _chunk_rows(starts: Tensor, counts: Tensor, total: int) -> Tensor:
    """Rows of chunks one after the other: chunk i has ``counts[i]`` rows from ``starts[i]``; [total] int64."""
    ends = counts.cumsum(0)
    shift = torch.repeat_interleave(starts - (ends - counts), counts, output_size=total)
    return torch.arange(total, device=starts.device) + shift


def _starts(counts: Tensor, part: int) -> Tensor:
    """Where chunks begin: [ETP, EP, G, L] counts, in this order, each ETP rank's part ``part`` rows long."""
    flat = counts.flatten(1)  # [ETP, EP x G x L]
    begun = flat.cumsum(1) - flat + part * torch.arange(len(flat), device=flat.device)[:, None]
    return begun.view_as(counts)


def _chunked(starts: Tensor, counts: Tensor, part: int, total: int) -> Chunked:
    """Order by expert of one group's chunks; starts and counts [ETP, EP, L]."""
    begun, sizes = (x.permute(2, 0, 1).reshape(-1) for x in (starts, counts))  # [L x ETP x EP]
    return Chunked(_chunk_rows(begun, sizes, total), part * len(counts), part)


def plan_exchange(routing_map: Tensor, groups: int, ranks: Ranks) -> ExpertPlan:
    """Plan the exchanges of this rank's tokens. Collective over ``ranks.both``; waits for the device once.

    Args:
        routing_map: [n, E] bool, the experts that each token goes to.
        groups: token groups, the same on every rank.
        ranks: that the experts are spread over; EP divides E.
    """
    bounds = group_bounds(len(routing_map), groups)
    own = torch.stack([routing_map[start:end].sum(0) for start, end in bounds])  # [G, E]
    everywhere = _gather_counts(own, ranks)
    place = 0 if ranks.expert is None else ranks.expert.rank()
    tensor_place = 0 if ranks.tensor is None else ranks.tensor.rank()
    held = routing_map.shape[1] // ranks.expert_size
    here = everywhere[..., place * held : (place + 1) * held]  # [ETP, EP, G, L]
    # One wait for the device: sizes of messages are the host's business.
    on_host = torch.cat([own.flatten(), here.flatten()]).cpu()
    sent = on_host[: own.numel()].view(groups, ranks.expert_size, held).sum(2)  # [G, EP]
    arriving = on_host[own.numel() :].view(here.shape)
    parts = arriving.sum((1, 3))  # [ETP, G]
    plans = []
    for group, (start, end) in enumerate(bounds):
        part = int(parts[:, group].max())
        counts = here[:, :, group]
        rows = _chunked(_starts(counts[:, :, None], part)[:, :, 0], counts, part, int(arriving[:, :, group].sum()))
        pairs = int(sent[group].sum())
        chosen = torch.nonzero_static(routing_map[start:end].t(), size=pairs)  # [pairs, 2], sorted by expert
        plans.append(
            GroupPlan(
                tokens=chosen[:, 1] + start,
                experts=chosen[:, 0],
                sends=sent[group].tolist(),
                receives=arriving[tensor_place, :, group].sum(1).tolist(),
                rows=rows,
                counts=arriving[:, :, group].sum((0, 1)).tolist(),
            )
        )
    return ExpertPlan(tuple(plans), _plan_scales(own, here, sent, arriving, tensor_place))


def _plan_scales(own: Tensor, here: Tensor, sent: Tensor, arriving: Tensor, tensor_place: int) -> ScalesPlan:
    part = int(arriving.sum((1, 2, 3)).max())
    starts = _starts(here, part)
    totals = arriving.sum((0, 1, 3)).tolist()
    rows = tuple(_chunked(starts[:, :, group], here[:, :, group], part, total) for group, total in enumerate(totals))
    groups, experts = own.shape
    flat = own.flatten()
    begun = (flat.cumsum(0) - flat).view(groups, experts)
    # Pairs lie by group and expert; each EP rank's experts of all groups go to it together.
    held = experts // sent.shape[1]
    # [G, EP x L] -> [G, EP, L] -> [EP, G, L] -> [EP x G x L]
    starts, sizes = (x.view(groups, -1, held).transpose(0, 1).reshape(-1) for x in (begun, own))
    to_send = _chunk_rows(starts, sizes, int(sent.sum()))
    return ScalesPlan(to_send, sent.sum(0).tolist(), arriving[tensor_place].sum((1, 2)).tolist(), rows)
