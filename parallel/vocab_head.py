"""The language-model head over a vocabulary split between ranks, and its loss without the logits of a whole sequence.

One fp32 copy of MiniMax-M1's logits of 1M tokens is 3 GiB a rank even when 256 ranks share it. Here logits are made for
a chunk of tokens at a time, in forward and again in backward; between the two one chunk's are kept, and two numbers a
token. With T tokens, width D and V rows of vocabulary over all ranks, the products cost 2TDV FLOPs in forward and 4TDV
in backward, as for whole logits, and the logits that are made again 2TDV (1 - 1 / chunks): a sequence that is one chunk
costs nothing more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from megatron_m1.kernels.matmul import ieee_fp32_matmul, matmul, matmul_add_
from megatron_m1.parallel.weight_gradient import main_gradient, mark_added


def vocab_parallel_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup,
    chunk_bytes: int,
    ieee_fp32: bool,
) -> Tensor:
    """Cross-entropy of every token's label under ``softmax(hidden @ weight.T)``, differentiable in hidden and weight.

    The tokens are split over ``group`` in order (sequence parallelism), the vocabulary too. Each chunk's tokens are
    gathered while the previous chunk is computed, and their gradient is reduced and scattered in ``weight``'s dtype
    while the chunk's share of the weight's gradient is computed; maxima and sums of exponentials are combined once for
    all chunks. Under megatron-core's DDP the weight's gradient is added to ``weight.main_grad`` in its dtype;
    otherwise it is summed over chunks in fp32 and returned in ``weight``'s.

    Args:
        hidden: [T / tp, D], this rank's tokens, any float dtype.
        weight: [V / tp, D], this rank's rows, fp32 or bf16: the products' dtype. Softmax and loss are fp32 always.
        labels: int [T], the same on all ranks: 0 to V - 1, or negative for a token without one: loss and gradient 0.
        group: the ranks that share tokens and vocabulary.
        chunk_bytes: memory for the logits of one chunk on this rank; at least one token a rank is taken.
        ieee_fp32: keep TF32 out of fp32 products, forward and backward.

    Returns:
        fp32 [T], the same on all ranks.

    Raises:
        ValueError: labels are not as many as the ranks' tokens, or there is no memory for a chunk.
    """
    _check(hidden, labels, group, chunk_bytes)
    loss: Tensor = _VocabParallelLoss.apply(hidden, weight, labels, group, chunk_bytes, ieee_fp32)
    return loss


@torch.no_grad()
def vocab_parallel_choice(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup,
    chunk_bytes: int,
    ieee_fp32: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of every token's label, as ``vocab_parallel_loss``, and the most likely token instead of gradients.

    Args and errors are those of ``vocab_parallel_loss``; one chunk's logits exist at a time here as well.

    Returns:
        fp32 [T], and int64 [T], the row with the highest logit (the first of equals); both the same on all ranks.
    """
    _check(hidden, labels, group, chunk_bytes)
    labels = labels.reshape(group.size(), -1)  # [T] -> [tp, T / tp]
    chunks = _chunks(hidden.shape[0], group.size(), weight, chunk_bytes)
    choice = torch.empty_like(labels, dtype=torch.int64)
    top, total, target, _ = _statistics(hidden, weight, labels, chunks, group, ieee_fp32=ieee_fp32, choice=choice)
    if group.size() > 1:
        own_top = top.clone()
        _combine(top, total, target, group)
        rows = weight.shape[0]
        # No row for the ranks that have not the highest: the least number is the first of equals.
        choice = torch.where(own_top == top, choice + group.rank() * rows, group.size() * rows)
        dist.all_reduce(choice, op=dist.ReduceOp.MIN, group=group)
    return _loss(labels, top, total, target), choice.flatten()


def _check(hidden: Tensor, labels: Tensor, group: dist.ProcessGroup, chunk_bytes: int) -> None:
    if labels.shape != (group.size() * hidden.shape[0],):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}: give one for each of {group.size()} x {hidden.shape[0]} tokens"
        )
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}: give at least 1")


def vocab_logits(hidden: Tensor, weight: Tensor, *, ieee_fp32: bool) -> Tensor:
    """All logits of this rank's vocabulary at once, ``hidden @ weight.T``, differentiable in both.

    Args:
        hidden: [T, D] in ``weight``'s dtype.
        weight: [V / tp, D]; its gradient goes where that of ``vocab_parallel_loss`` goes.
        ieee_fp32: keep TF32 out of fp32 products, forward and backward.

    Returns:
        [T, V / tp] in their dtype.
    """
    logits: Tensor = _VocabLogits.apply(hidden, weight, ieee_fp32)
    return logits


@contextlib.contextmanager
def _precision(x: Tensor, *, ieee_fp32: bool) -> Iterator[None]:
    """Products in their factors' dtype on ``x``'s device: autocast would take them to bfloat16."""
    tf32 = ieee_fp32_matmul() if ieee_fp32 else contextlib.nullcontext()
    with torch.autocast(x.device.type, enabled=False), tf32:
        yield


def _chunks(rows: int, ranks: int, weight: Tensor, chunk_bytes: int) -> list[slice]:
    """Equal shares of each rank's ``rows`` tokens, the logits of which fit ``chunk_bytes``."""
    # bf16 and fp16 logits are made before their fp32 copy, and both take memory until the copy is whole.
    bytes_per_logit = 4 if weight.dtype == torch.float32 else 4 + weight.element_size()
    most = max(1, chunk_bytes // (ranks * weight.shape[0] * bytes_per_logit))
    size = math.ceil(rows / math.ceil(rows / most))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _gathered(
    hidden: Tensor, chunks: Sequence[slice], group: dist.ProcessGroup, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield each chunk's tokens of all ranks, [tp * c, D], rank after rank; the next chunk's travel meanwhile."""
    if group.size() == 1:
        for rows in chunks:
            yield hidden[rows].to(dtype)
        return

    def start(rows: slice) -> tuple[Tensor, Any]:
        part = hidden[rows]
        whole = part.new_empty(group.size() * part.shape[0], part.shape[1])
        return whole, dist.all_gather_into_tensor(whole, part, group=group, async_op=True)

    travelling = start(chunks[0])
    for following in [*chunks[1:], None]:
        whole, work = travelling
        work.wait()
        if following is not None:
            travelling = start(following)
        yield whole.to(dtype)


def _columns(labels: Tensor, weight: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Which labels lie in this rank's vocabulary, and the column of each, [n, 1]; 0 where it is another rank's."""
    column = labels.long() - group.rank() * weight.shape[0]
    own = (column >= 0) & (column < weight.shape[0])
    return own, torch.where(own, column, 0).unsqueeze(1)


def _combine(top: Tensor, total: Tensor, target: Tensor, group: dist.ProcessGroup) -> None:
    """Turn this rank's maxima, sums of exponentials and label's logits into those of the whole vocabulary."""
    local = top.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack((total.mul_((local - top).exp_()), target))
    dist.all_reduce(sums, group=group)
    total.copy_(sums[0])
    target.copy_(sums[1])


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunks: Sequence[slice],
    group: dist.ProcessGroup,
    *,
    ieee_fp32: bool,
    choice: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What this rank's vocabulary says of every token, chunk by chunk.

    Args:
        hidden, weight, group, ieee_fp32: as of ``vocab_parallel_loss``.
        labels: [tp, T / tp].
        chunks: of ``_chunks``.
        choice: int64 [tp, T / tp]; if given, filled with the column of each token's highest logit, the first of equals.

    Returns:
        fp32 [tp, T / tp] each: highest logit, sum of the exponentials of the differences to it, and the label's logit,
        0 where the label is another rank's; and those exponentials of the last chunk, [tp * c, V / tp].
    """
    ranks = group.size()
    top, total, target = (hidden.new_empty(labels.shape, dtype=torch.float32) for _ in range(3))
    with _precision(hidden, ieee_fp32=ieee_fp32):
        for rows, tokens in zip(chunks, _gathered(hidden, chunks, group, weight.dtype), strict=True):
            logits = None  # frees the last chunk's, so that there never are two at a time
            logits = matmul(tokens, weight.t()).float()  # [tp * c, V / tp]
            own, column = _columns(labels[:, rows].flatten(), weight, group)
            highest = logits.amax(dim=1)
            if choice is not None:
                choice[:, rows] = logits.argmax(dim=1).view(ranks, -1)
            # [tp * c] -> [tp, c]
            top[:, rows] = highest.view(ranks, -1)
            target[:, rows] = torch.where(own, logits.gather(1, column).squeeze(1), 0.0).view(ranks, -1)
            total[:, rows] = logits.sub_(highest.unsqueeze(1)).exp_().sum(dim=1).view(ranks, -1)
    assert logits is not None
    return top, total, target, logits


def _loss(labels: Tensor, top: Tensor, total: Tensor, target: Tensor) -> Tensor:
    """Loss of every token, [T], from what the whole vocabulary says of it, [tp, T / tp] each."""
    # Two differences of numbers that may be large: log-sum-exp first would lose digits.
    loss = total.log() + (top - target)
    return torch.where(labels >= 0, loss, 0.0).flatten()


class _WeightGradient:
    """Where a weight's gradient is summed: in DDP's buffer, or in fp32 memory of its own."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._main = main_gradient(weight)
        self._total = torch.zeros_like(weight, dtype=torch.float32) if self._main is None else self._main

    def add(self, a: Tensor, b: Tensor) -> None:
        matmul_add_(self._total, a, b)

    def result(self) -> Tensor:
        if self._main is None:
            return self._total.to(self._weight.dtype)
        return mark_added([self._weight])[0]


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup,
        chunk_bytes: int,
        ieee_fp32: bool,
    ) -> Tensor:
        ranks = group.size()
        labels = labels.reshape(ranks, -1)  # [T] -> [tp, T / tp]
        chunks = _chunks(hidden.shape[0], ranks, weight, chunk_bytes)
        top, total, target, logits = _statistics(hidden, weight, labels, chunks, group, ieee_fp32=ieee_fp32)
        ctx.kept_top = top[:, chunks[-1]].clone()
        if ranks > 1:
            _combine(top, total, target, group)
        ctx.save_for_backward(hidden, weight, labels, top, total)
        ctx.kept = logits
        ctx.chunks, ctx.group, ctx.ieee_fp32 = chunks, group, ieee_fp32
        return _loss(labels, top, total, target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, top, total = ctx.saved_tensors
        group, chunks = ctx.group, ctx.chunks[::-1]
        # [T] -> [tp, T / tp]
        grad = torch.where(labels >= 0, grads[0].reshape(labels.shape), 0.0)
        scale = grad / total
        kept, ctx.kept = ctx.kept, None
        hidden_grad, weight_grad = torch.empty_like(hidden), _WeightGradient(weight)
        with _precision(hidden, ieee_fp32=ctx.ieee_fp32):
            for rows, tokens in zip(chunks, _gathered(hidden, chunks, group, weight.dtype), strict=True):
                factor = scale[:, rows]
                if kept is None:
                    logits = matmul(tokens, weight.t()).float()  # [tp * c, V / tp]
                    logits.sub_(top[:, rows].reshape(-1, 1)).exp_()
                else:
                    logits, kept = kept, None
                    factor = factor * (ctx.kept_top - top[:, rows]).exp_()
                own, column = _columns(labels[:, rows].flatten(), weight, group)
                at_label = torch.where(own, grad[:, rows].flatten(), 0.0).unsqueeze(1)
                logits.mul_(factor.reshape(-1, 1)).scatter_add_(1, column, -at_label)
                logits = logits.to(weight.dtype)
                part, work = _scattered(matmul(logits, weight), group)
                weight_grad.add(logits.t(), tokens)
                del logits  # so that the next chunk's never lie beside them
                if work is not None:
                    work.wait()
                hidden_grad[rows] = part
        return hidden_grad, weight_grad.result(), None, None, None, None


def _scattered(partial: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    """This rank's share of the ranks' sum of ``partial``, [tp * c, D] -> [c, D], once the work is waited for."""
    if group.size() == 1:
        return partial, None
    part = partial.new_empty(partial.shape[0] // group.size(), partial.shape[1])
    return part, dist.reduce_scatter_tensor(part, partial, group=group, async_op=True)


class _VocabLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ieee_fp32: bool) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.ieee_fp32 = ieee_fp32
        with _precision(hidden, ieee_fp32=ieee_fp32):
            return matmul(hidden, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        weight_grad = _WeightGradient(weight)
        with _precision(hidden, ieee_fp32=ctx.ieee_fp32):
            weight_grad.add(grads[0].t(), hidden)
            return matmul(grads[0], weight), weight_grad.result(), None
