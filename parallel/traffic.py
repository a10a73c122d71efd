"""What one layer's exchanges send and receive, and what a rank computes: counted on the plans that train."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_m1.parallel.ring_plan import RingPlan
from megatron_m1.parallel.state_plan import StatePlan


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank in one layer."""

    sent: int
    received: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.received + other.received)


def ring_traffic(plan: RingPlan, *, token_bytes: int, gradient_bytes: int) -> tuple[Traffic, Traffic]:
    """Forward and backward of a softmax layer.

    Args:
        plan: the rank's.
        token_bytes: of one token's keys and values, all groups: 2 x groups x dim x element size.
        gradient_bytes: of their gradients, which travel in float32.
    """
    sent, received = sum(step.sent for step in plan.steps), sum(step.receives for step in plan.steps)
    forward = Traffic(sent * token_bytes, received * token_bytes)
    return forward, forward + Traffic(received * gradient_bytes, sent * gradient_bytes)


def state_traffic(plan: StatePlan, ranks: int, *, state_bytes: int) -> tuple[Traffic, Traffic]:
    """Forward and backward of a lightning layer: each rank's slots reach all the others.

    Args:
        plan: any rank's, they agree on the slots.
        ranks: that share the pack.
        state_bytes: of one state, all heads: heads x dim x dim x 4.
    """
    forward, backward = (exchange.slots * (ranks - 1) * state_bytes for exchange in (plan.forward, plan.backward))
    return Traffic(forward, forward), Traffic(backward, backward)


def attention_pairs(plan: RingPlan) -> int:
    """(query, key) pairs that the rank computes in a softmax layer."""
    local = sum(length * (length + 1) // 2 for length in (b - a for a, b in itertools.pairwise(plan.local_bounds)))
    rectangles = (rectangle for step in plan.steps for rectangle in step.rectangles)
    return local + sum((r.queries[1] - r.queries[0]) * (r.keys[1] - r.keys[0]) for r in rectangles)


def ring_memory(plan: RingPlan, *, token_bytes: int, gradient_bytes: int) -> int:
    """Most bytes that a softmax layer's backward pass holds of other ranks: two blocks, and gradients of two."""
    received, sent = [step.receives for step in plan.steps], [step.sent for step in plan.steps]
    buffers = sum(max(received[i::2], default=0) for i in range(2))
    gradients = max((a + b for a, b in itertools.pairwise([0, *received])), default=0) + max(sent, default=0)
    return buffers * token_bytes + gradients * gradient_bytes
