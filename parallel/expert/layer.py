"""A layer's experts over ranks as one autograd function, whose passes run the lists of ``schedule.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from megatron_m1.parallel.expert.links import Links
from megatron_m1.parallel.expert.plan import ExpertPlan
from megatron_m1.parallel.expert.schedule import Kind, Lane, Operation, schedule
from megatron_m1.parallel.expert.travel import Travel, spread
from megatron_m1.parallel.weight_gradient import main_gradient, mark_added


class Experts(Protocol):
    """The local experts' products, in three passes. Rows are sorted by expert; ``counts`` has those of each.

    Weights whose ``requires_grad`` is false get no gradient, and no work or memory goes there.
    """

    def forward(self, x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Output [rows, hidden] of x [rows, hidden] and scale [rows], and what the backward passes need."""
        ...

    def keep(self, x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Any:
        """What ``forward`` keeps, without its output."""
        ...

    def backward(self, kept: Any, grad: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Any]:
        """Gradients of x and scale from the output's, and what the weights' gradients are made of."""
        ...

    def add_weight_gradients(self, pending: Any, totals: list[Tensor | None], *, more: bool) -> None:
        """Add the weights' gradients to ``totals``, in the weights' order and in place; None stands for zero.

        ``more`` says that others are added to the same totals, so that new ones must not be rounded to 16 bits.
        """
        ...


@dataclass(frozen=True)
class Call:
    """What stays the same over both passes of one call."""

    plan: ExpertPlan
    links: Links
    experts: Experts
    recompute: bool = False
    """Keep nothing of the experts' work. The backward pass sends each token once more, together with its gradient, and
    computes the first products again; results are not sent again."""

    def schedule(self, *, backward: bool) -> tuple[Operation, ...]:
        """The list of one pass."""
        expert, tensor = (1 if link is None else link.size for link in (self.links.expert, self.links.tensor))
        return schedule(len(self.plan.groups), expert, tensor, backward=backward)


class _Pass:
    """What both passes do: rows of ``source`` [n, ...] to the experts' ranks, results to ``result`` [n, width]."""

    label = ""

    def __init__(self, call: Call, source: Tensor, width: int) -> None:
        self.call, self.groups, self.links = call, call.plan.groups, call.links
        self.source = source
        for link in (call.links.expert, call.links.tensor):
            if link is not None:
                link.follow()
        self.result = source.new_zeros(len(source), width)
        self.travels: dict[int, Travel] = {}

    def run(self, methods: dict[Kind, Callable[[int], None]], *, backward: bool) -> None:
        """Run the list from top to bottom, each operation in its lane."""
        methods = {
            Kind.DISPATCH: self.dispatch,
            Kind.GATHER: self.gather,
            Kind.COMBINE: self.combine,
            Kind.COLLECT: self.collect,
        } | methods
        for operation in self.call.schedule(backward=backward):
            with record_function(f"expert: {operation}{self.label}"), self._lane(operation.lane):
                methods[operation.kind](operation.group)

    def _lane(self, lane: Lane) -> AbstractContextManager[None]:
        link = {Lane.EXPERT: self.links.expert, Lane.TENSOR: self.links.tensor, Lane.COMPUTE: None}[lane]
        return nullcontext() if link is None else link.lane()

    def pick(self, group: int) -> Travel:
        """The group's rows, sorted by the expert that they go to."""
        tokens = self.groups[group].tokens
        if self.source.is_cuda:
            self.source.record_stream(torch.cuda.current_stream())
            tokens.record_stream(torch.cuda.current_stream())
        return Travel(self.source.index_select(0, tokens))

    def dispatch(self, group: int) -> None:
        """Send them to the experts' ranks."""
        plan = self.groups[group]
        travel = self.travels[group] = self.pick(group)
        assert self.links.expert is not None
        travel.start_all_to_all(plan.receives, plan.sends, self.links.expert)

    def gather(self, group: int) -> None:
        """Share them with the ranks that have the other shards."""
        assert self.links.tensor is not None
        travel = self.travels.get(group) or self.pick(group)
        travel.start_gather(self.groups[group].rows, self.links.tensor)
        self.travels[group] = travel

    def arrived(self, group: int) -> Tensor:
        """Wait for the group's rows, and sort them by expert."""
        travel = self.travels.pop(group, None) or self.pick(group)
        return travel.arrived().index_select(0, self.groups[group].rows.order)

    def send_back(self, group: int, rows: Tensor) -> None:
        """Take the results [rows, hidden], sorted by expert."""
        self.travels[group] = Travel(spread(rows, self.groups[group].rows))

    def reduce(self, group: int) -> None:
        """Add up what the shards have computed."""
        plan = self.groups[group]
        assert self.links.tensor is not None
        self.travels[group].start_reduce(plan.rows, plan.received, self.links.tensor)

    def combine(self, group: int) -> None:
        """Send the results to the tokens' ranks."""
        plan = self.groups[group]
        assert self.links.expert is not None
        self.travels[group].start_all_to_all(plan.sends, plan.receives, self.links.expert)

    def collect(self, group: int) -> None:
        """Add them to the tokens'."""
        rows = self.travels.pop(group).arrived()
        self.result.index_add_(0, self.groups[group].tokens, rows.to(self.result.dtype))


class _Forward(_Pass):
    def __init__(self, call: Call, hidden: Tensor, scales: Tensor, weights: Sequence[Tensor]) -> None:
        """``scales`` [pairs]: of all groups, group by group."""
        super().__init__(call, hidden, hidden.shape[1])
        self.weights, self.dtype = weights, scales.dtype
        self.kept: list[Any] = [None] * len(self.groups)
        self.scales = Travel(scales.index_select(0, call.plan.scales.to_send))
        self.run(
            {
                Kind.SEND_SCALES: self.send_scales,
                Kind.SHARE_SCALES: self.share_scales,
                Kind.EXPERTS: self.experts,
                Kind.REDUCE: self.reduce,
            },
            backward=False,
        )

    def send_scales(self, _: int) -> None:
        plan = self.call.plan.scales
        assert self.links.expert is not None
        self.scales.start_all_to_all(plan.receives, plan.sends, self.links.expert)

    def share_scales(self, _: int) -> None:
        assert self.links.tensor is not None
        self.scales.start_gather(self.call.plan.scales.rows[0], self.links.tensor)

    def experts(self, group: int) -> None:
        scales = self.scales.arrived().index_select(0, self.call.plan.scales.rows[group].order)
        rows, kept = self.call.experts.forward(self.arrived(group), scales, self.groups[group].counts, self.weights)
        self.kept[group] = scales if self.call.recompute else kept
        # The shards' results are added up in the probabilities' precision, as megatron-core does.
        self.send_back(group, rows if self.links.tensor is None else rows.to(self.dtype))


class _Backward(_Pass):
    label = " backward"

    def __init__(
        self,
        call: Call,
        hidden: Tensor | None,
        grad: Tensor,
        kept: list[Any],
        weights: Sequence[Tensor],
        scales: Tensor,
    ) -> None:
        """``scales`` [pairs] becomes the gradients of all groups' probabilities, group by group.

        ``hidden`` is given where the experts' work is to be computed again.
        """
        source = grad.contiguous() if hidden is None else torch.cat([hidden, grad], dim=1)  # [n, 2 hidden]
        super().__init__(call, source, grad.shape[1])
        self.weights, self.kept = weights, kept
        self.pending: dict[int, Any] = {}
        self.totals = [main_gradient(weight) if weight.requires_grad else None for weight in weights]
        rows = call.plan.scales.rows[0]
        self.laid_scales = scales.new_zeros(rows.arrived)
        self.scales: Travel | None = None
        self.run(
            {
                Kind.SEND_SCALES: self.send_scales,
                Kind.SHARE_SCALES: self.share_scales,
                Kind.EXPERTS: self.experts,
                Kind.REDUCE: self.reduce,
                Kind.WEIGHTS: self.weight_gradients,
            },
            backward=True,
        )
        arrived = self.laid_scales if self.scales is None else self.scales.arrived()
        scales.index_copy_(0, call.plan.scales.to_send, arrived)

    def experts(self, group: int) -> None:
        grad, kept, self.kept[group] = self.arrived(group), self.kept[group], None
        if self.call.recompute:
            tokens, grad = (half.contiguous() for half in grad.chunk(2, dim=1))
            kept = self.call.experts.keep(tokens, kept, self.groups[group].counts, self.weights)
        grad, grad_scales, self.pending[group] = self.call.experts.backward(kept, grad, self.weights)
        self.laid_scales.index_copy_(0, self.call.plan.scales.rows[group].order, grad_scales)
        if group == len(self.groups) - 1:
            self.scales = Travel(self.laid_scales)
        self.send_back(group, grad)

    def weight_gradients(self, group: int) -> None:
        self.call.experts.add_weight_gradients(self.pending.pop(group), self.totals, more=len(self.groups) > 1)

    def share_scales(self, _: int) -> None:
        plan = self.call.plan.scales
        assert self.links.tensor is not None and self.scales is not None
        self.scales.start_reduce(plan.rows[0], sum(plan.receives), self.links.tensor)

    def send_scales(self, _: int) -> None:
        plan = self.call.plan.scales
        assert self.links.expert is not None and self.scales is not None
        self.scales.start_all_to_all(plan.sends, plan.receives, self.links.expert)


def _weight_gradients(totals: list[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor | None]:
    """What autograd gets: gradients in the weights' dtype, taken out of ``totals``; None for weights that need none.

    So never do all exist in both precisions, and those in main gradients exist once.
    """
    in_main = [w.requires_grad and main_gradient(w) is not None for w in weights]
    blanks = iter(mark_added([w for w, is_in_main in zip(weights, in_main, strict=True) if is_in_main]))
    found: list[Tensor | None] = []
    for index, weight in enumerate(weights):
        total, totals[index] = totals[index], None
        if not weight.requires_grad:
            found.append(None)
        elif in_main[index]:
            found.append(next(blanks))
        else:
            found.append(torch.zeros_like(weight) if total is None else total.to(weight.dtype))
    return found


def _all_pairs(plan: ExpertPlan) -> tuple[Tensor, Tensor]:
    """Tokens and experts of all pairs, [pairs] each, group by group."""
    tokens, experts = (torch.cat([getattr(g, name) for g in plan.groups]) for name in ("tokens", "experts"))
    return tokens, experts


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, probs: Tensor, call: Call, *weights: Tensor) -> Tensor:
        tokens, experts = _all_pairs(call.plan)
        done = _Forward(call, hidden, probs[tokens, experts], weights)
        ctx.call, ctx.kept, ctx.pairs = call, done.kept, (tokens, experts)
        ctx.save_for_backward(hidden if call.recompute else None, probs, *weights)
        return done.result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, probs, *saved = ctx.saved_tensors
        weights = [w if needed else w.detach() for w, needed in zip(saved, ctx.needs_input_grad[3:], strict=True)]
        if ctx.kept is None:
            raise RuntimeError("the experts' backward pass has run already, and kept nothing: it runs once")
        tokens, experts = ctx.pairs
        grad_scales = probs.new_empty(len(tokens))
        done = _Backward(ctx.call, hidden, grads[0], ctx.kept, weights, grad_scales)
        ctx.kept = None
        grad_probs = torch.zeros_like(probs)
        grad_probs[tokens, experts] = grad_scales
        return done.result, grad_probs, None, *_weight_gradients(done.totals, weights)


def expert_layer(hidden: Tensor, probs: Tensor, weights: Sequence[Tensor], call: Call) -> Tensor:
    """Every token through its experts, wherever they are. Collective over EP and ETP, forward and backward.

    Args:
        hidden: [n, hidden], this rank's tokens.
        probs: [n, experts], the router's, in its dtype.
        weights: of the local experts, as ``call.experts`` takes them. Under megatron-core's DDP their gradients are
            added to its fp32 sums, ``main_grad``, group by group; else summed in fp32 and returned in their dtype.
        call: the plan of these tokens, and how it is run.

    Returns:
        [n, hidden] in ``hidden``'s dtype: the sum over each token's experts of their outputs, weighted by ``probs``.
        Differentiable once in hidden, probs and weights.
    """
    if not torch.is_grad_enabled():
        call = replace(call, recompute=True)  # nothing is kept
    result: Tensor = _ExpertLayer.apply(hidden, probs, call, *weights)
    return result
