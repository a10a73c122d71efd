"""Which choices an expert's capacity leaves, when it counts the tokens of all ranks: MiniMax's global router.

MiniMax-01 paper (arXiv 2501.08313), section 2.2.2: ranks tell each other how many tokens wait for each expert before
any is sent. Which share of a capacity a rank gets is not published; here it is in proportion to those that wait there.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


def capacity(tokens: int, topk: int, experts: int, factor: float) -> int:
    """Tokens that an expert takes of all ranks' ``tokens``: ``factor`` times the balanced share, rounded up."""
    return math.ceil(tokens * topk / experts * factor)


def share_capacity(waiting: Tensor, limit: int) -> Tensor:
    """Deal each expert's capacity out to the ranks.

    Args:
        waiting: [R, E] int64, tokens of each rank that chose each expert.
        limit: tokens that an expert takes of all ranks together.

    Returns:
        [R, E] int64, tokens that each rank may send to each expert. Where no more wait than fit, all of them; else
        ``limit * waiting / total`` rounded down, and one more for the first ranks whose share was rounded, so that the
        sum is ``limit``.
    """
    total = waiting.sum(0)  # [E]
    scaled = waiting * limit
    whole = scaled // total.clamp_min(1)
    rounded = (scaled % total.clamp_min(1)) > 0
    missing = limit - whole.sum(0)
    one_more = rounded & (rounded.cumsum(0) <= missing)
    return torch.where(total <= limit, waiting, whole + one_more)


def keep_most_likely(probs: Tensor, chosen: Tensor, quota: Tensor) -> Tensor:
    """Of the tokens that chose an expert, the ``quota`` most likely ones; of equals, those that come first.

    Args:
        probs: [n, E], of the chosen experts.
        chosen: [n, E] bool.
        quota: [E] int64.

    Returns:
        [n, E] bool, true for what is kept.
    """
    order = torch.where(chosen, probs, -torch.inf).sort(dim=0, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    )
    return chosen & (place < quota)


def within_capacity(
    probs: Tensor, chosen: Tensor, *, topk: int, factor: float, counted: Tensor | None, group: dist.ProcessGroup
) -> Tensor:
    """Which choices of this rank's tokens fit the experts' capacity over all ranks of ``group``. Collective.

    Args:
        probs: [n, E], of the chosen experts.
        chosen: [n, E] bool.
        topk: experts that each token chose.
        factor: capacity as a multiple of the balanced share.
        counted: [n] bool, tokens that count; the others (padding) are kept nowhere and take no place. None counts all.
        group: all ranks whose tokens share the capacity.

    Returns:
        [n, E] bool.
    """
    if counted is not None:
        chosen = chosen & counted[:, None]
    tokens = chosen.new_tensor(len(chosen), dtype=torch.int64) if counted is None else counted.sum()
    own = torch.cat([chosen.sum(0), tokens[None]])  # [E + 1]
    everywhere = own.new_empty(group.size() * len(own))
    dist.all_gather_into_tensor(everywhere, own, group=group)
    table = everywhere.view(group.size(), -1)
    waiting, all_tokens = table[:, :-1], int(table[:, -1].sum())
    limit = capacity(all_tokens, topk, chosen.shape[1], factor)
    return keep_most_likely(probs, chosen, share_capacity(waiting, limit)[group.rank()])
