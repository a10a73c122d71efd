"""What tests and benchmarks of expert layers run on every rank."""

from __future__ import annotations

import torch.distributed as dist

from megatron_m1.parallel.expert.plan import Ranks


def process_groups(expert_ranks: int, tensor_ranks: int, rank: int) -> Ranks:
    """EP, ETP and both over the first ranks of the world, with ETP ranks as neighbours. Collective."""

    def mine(groups: list[list[int]]) -> dist.ProcessGroup | None:
        made = [dist.new_group(group) for group in groups]
        (found,) = (g for g, members in zip(made, groups, strict=True) if rank in members)
        return found if isinstance(found, dist.ProcessGroup) and len(groups[0]) > 1 else None

    e, t = expert_ranks, tensor_ranks
    return Ranks(
        expert=mine([[i * t + j for i in range(e)] for j in range(t)]),
        tensor=mine([[i * t + j for j in range(t)] for i in range(e)]),
        both=mine([list(range(e * t))]),
    )
