"""The order in which one expert layer's exchanges and products are issued: data, the same on every rank.

Tokens are split into groups. Each goes through a chain: dispatch to the experts' ranks (all-to-all, EP), gather over
the ranks that share an expert (ETP), the experts' products, reduce over ETP, combine (all-to-all, EP), collect. The
backward pass is the same chain for gradients, and the products with which weights' gradients are made.

The chains are skewed: in slot t the products of group t are computed, while on their way are the tokens of t + 1 (its
gather) and t + 2 (its dispatch), and the results of t - 1 (reduce) and t - 2 (combine). So nothing that travels is
waited for before another group's products have been computed, and EP's and ETP's messages, which are in different
process groups, travel side by side. MiniMax-01 paper (arXiv 2501.08313), section 3.1, figures 9 and 10.

Within one process group the order is that of this list, on every rank: collectives there never cross.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


class Kind(StrEnum):
    """What one entry of the list does."""

    SEND_SCALES = "send scales"
    """EP all-to-all of all groups' router probabilities (backward: of their gradients)."""
    SHARE_SCALES = "share scales"
    """ETP gather of them (backward: reduce)."""
    DISPATCH = "dispatch"
    GATHER = "gather"
    EXPERTS = "experts"
    REDUCE = "reduce"
    COMBINE = "combine"
    COLLECT = "collect"
    """Waits for a group's results, and adds them to the layer's."""
    WEIGHTS = "weights"
    """Backward: the group's share of the weights' gradients."""


class Lane(StrEnum):
    """Where an entry runs; entries of one lane run in the order of the list."""

    EXPERT = "EP"
    TENSOR = "ETP"
    COMPUTE = "compute"


LANES = {
    Kind.SEND_SCALES: Lane.EXPERT,
    Kind.SHARE_SCALES: Lane.TENSOR,
    Kind.DISPATCH: Lane.EXPERT,
    Kind.GATHER: Lane.TENSOR,
    Kind.EXPERTS: Lane.COMPUTE,
    Kind.REDUCE: Lane.TENSOR,
    Kind.COMBINE: Lane.EXPERT,
    Kind.COLLECT: Lane.COMPUTE,
    Kind.WEIGHTS: Lane.COMPUTE,
}
CHAIN = (Kind.DISPATCH, Kind.GATHER, Kind.EXPERTS, Kind.REDUCE, Kind.COMBINE, Kind.COLLECT)


@dataclass(frozen=True)
class Operation:
    """One entry of the list."""

    kind: Kind
    group: int = 0
    """Token group; 0 for the scales, which travel for all groups at once."""

    @property
    def lane(self) -> Lane:
        """Where it runs."""
        return LANES[self.kind]

    def __str__(self) -> str:
        is_of_all = self.kind in (Kind.SEND_SCALES, Kind.SHARE_SCALES)
        return str(self.kind) if is_of_all else f"{self.kind} {self.group}"


def _links(expert_ranks: int, tensor_ranks: int) -> set[Lane]:
    """Lanes in which anything travels."""
    sizes = {Lane.EXPERT: expert_ranks, Lane.TENSOR: tensor_ranks}
    return {Lane.COMPUTE, *(lane for lane, size in sizes.items() if size > 1)}


def chain_of(expert_ranks: int, tensor_ranks: int) -> tuple[Kind, ...]:
    """What a group goes through, without exchanges that have no partner."""
    lanes = _links(expert_ranks, tensor_ranks)
    return tuple(kind for kind in CHAIN if LANES[kind] in lanes)


def schedule(groups: int, expert_ranks: int, tensor_ranks: int, *, backward: bool = False) -> tuple[Operation, ...]:
    """The whole list of one pass.

    Args:
        groups: token groups, 1 or more.
        expert_ranks: EP size.
        tensor_ranks: ETP size.
        backward: of the backward pass.

    Returns:
        Every operation after those that it needs (``needs``), so that a rank may run it from top to bottom.
    """
    lanes, chain = _links(expert_ranks, tensor_ranks), chain_of(expert_ranks, tensor_ranks)
    middle = chain.index(Kind.EXPERTS)
    scales = [Operation(kind) for kind in (Kind.SEND_SCALES, Kind.SHARE_SCALES) if LANES[kind] in lanes]
    found = [] if backward else scales[:1]
    # In the order in which what follows needs them: tokens on their way in come before results on their way out.
    order = [*range(middle - 1, -1, -1), *range(middle + 1, len(chain))]
    for slot in range(-middle, groups + len(chain) - middle):
        if not backward and slot == 1 - middle:
            found += scales[1:]
        if backward and slot == groups:
            # The gradients of all scales are known; they are small, and the last group's weights hide them.
            found += scales[::-1]
        found += [
            Operation(chain[place], slot + middle - place) for place in order if 0 <= slot + middle - place < groups
        ]
        # Here the group before this one has sent its results on their way.
        if backward and 0 <= slot - 1 < groups:
            found.append(Operation(Kind.WEIGHTS, slot - 1))
        if 0 <= slot < groups:
            found.append(Operation(Kind.EXPERTS, slot))
    return tuple(found)


def needs(
    operation: Operation, groups: int, expert_ranks: int, tensor_ranks: int, *, backward: bool
) -> list[Operation]:
    """What must have ended before ``operation`` may run."""
    lanes, chain = _links(expert_ranks, tensor_ranks), chain_of(expert_ranks, tensor_ranks)
    scales = [Operation(kind) for kind in (Kind.SEND_SCALES, Kind.SHARE_SCALES) if LANES[kind] in lanes]
    all_experts = [Operation(Kind.EXPERTS, group) for group in range(groups)]
    if operation.kind is Kind.WEIGHTS:
        return [Operation(Kind.EXPERTS, operation.group)]
    if operation in scales:
        travel = scales[::-1] if backward else scales
        before = [a for a, b in pairwise(travel) if b == operation]
        return before or (all_experts if backward else [])
    before = [Operation(a, operation.group) for a, b in pairwise(chain) if b == operation.kind]
    if operation.kind is Kind.EXPERTS and not backward:
        before += scales[-1:]
    return before
