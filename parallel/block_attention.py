"""Softmax attention of some queries with some keys, as part of a larger softmax: with its LSE, and backward from it.

The one place that knows the kernels of the ring. Forward returns the log-sum-exp of each query's scores, by which parts
are merged. Backward takes the *merged* output and LSE: then each part's gradients are its share of the whole's. torch's
public ``varlen_attn`` takes its LSE for a constant, so the operators below it are called.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_TOKENS = 256
"""On a CPU, neighbouring short documents are attended together, under a mask, up to this many tokens."""


@dataclass(frozen=True)
class Block:
    """Which queries meet which keys: run i of the queries meets run i of the keys, and no other."""

    queries: Sequence[int]
    """[N + 1] bounds of the runs of queries, from 0, in tokens."""
    keys: Sequence[int]
    """[N + 1] bounds of the runs of keys."""
    causal: bool
    """Query t of a run meets keys 0 .. t of it; runs are then as long. Otherwise all of them."""


def attend(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Attention scaled by 1/sqrt(dim).

    Args:
        q: [n, heads, dim], dense in the last dimension, as are k and v; bfloat16 or float16 on a GPU.
        k: [m, groups, dim], ``groups`` divides ``heads``.
        v: [m, groups, dim].
        block: who meets whom; its bounds end at n and m.

    Returns:
        [n, heads, dim] in q's dtype, and the LSE [heads, n] in float32 (float64 for float64 on a CPU).
    """
    return _gpu_forward(q, k, v, block) if q.is_cuda else _cpu_forward(q, k, v, block)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients of q, k, v.

    Args:
        grad: [n, heads, dim], gradient of the merged output.
        q, k, v, block: as in ``attend``.
        output: [n, heads, dim], merged over all blocks, in q's dtype.
        lse: [heads, n], merged over all blocks.
    """
    run = _gpu_backward if q.is_cuda else _cpu_backward
    return run(grad, q, k, v, output, lse, block)


def document_groups(bounds: Sequence[int], limit: int = GROUP_TOKENS) -> list[tuple[int, int]]:
    """Cut a pack into runs of whole documents, as (first, last + 1) document indices.

    A run holds as many neighbouring documents as fit in ``limit`` tokens, or one longer document alone.
    """
    groups: list[tuple[int, int]] = []
    first = 0
    for document in range(len(bounds) - 1):
        if document > first and bounds[document + 1] - bounds[first] > limit:
            groups.append((first, document))
            first = document
    groups.append((first, len(bounds) - 1))
    return groups


def document_mask(bounds: Sequence[int]) -> Tensor:
    """[m, m] true where the row's token may see the column's: the same document, not later."""
    lengths = torch.tensor(bounds).diff()
    documents = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return (documents[:, None] == documents[None, :]).tril_()


def _gpu_bounds(block: Block, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    tensors, longest = [], []
    for bounds in (block.queries, block.keys):
        tensors.append(torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True))
        longest.append(max(end - start for start, end in itertools.pairwise(bounds)))
    return tensors[0], tensors[1], longest[0], longest[1]


def _gpu_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    starts = _gpu_bounds(block, q.device)
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *starts, 0.0, block.causal, return_debug_mask=False
    )
    return output, lse


def _gpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    starts = _gpu_bounds(block, q.device)
    # Without dropout neither the generator's state nor the unused tensor is read.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k, v, output, lse.contiguous(), *starts, 0.0, block.causal, state, unused
    )
    return grads


@dataclass(frozen=True)
class _Run:
    """One call of the CPU's kernel, which goes through the scores tile by tile."""

    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None
    """[n, m], 0 or -inf, added to the scores."""


def _cpu_runs(block: Block, dtype: torch.dtype) -> Iterator[_Run]:
    if not block.causal:
        for (start, end), (first, last) in zip(
            itertools.pairwise(block.queries), itertools.pairwise(block.keys), strict=True
        ):
            yield _Run(slice(start, end), slice(first, last), False, None)
        return
    bounds = block.queries
    for first, last in document_groups(bounds):
        tokens, mask = slice(bounds[first], bounds[last]), None
        if last - first > 1:
            allowed = document_mask([bound - bounds[first] for bound in bounds[first : last + 1]])
            mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
        yield _Run(tokens, tokens, mask is None, mask)


def _heads_first(x: Tensor, rows: slice, heads: int) -> Tensor:
    """[n, groups, dim] -> [1, heads, rows, dim], each group repeated for the heads that it serves."""
    part = x[rows].transpose(0, 1)
    if part.shape[0] != heads:
        part = part.repeat_interleave(heads // part.shape[0], dim=0)
    return part.unsqueeze(0)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for run in _cpu_runs(block, q.dtype):
        parts = (_heads_first(q, run.queries, heads), *(_heads_first(x, run.keys, heads) for x in (k, v)))
        out, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, 0.0, run.causal, attn_mask=run.mask
        )
        output[run.queries] = out[0].transpose(0, 1)  # [heads, n, dim] -> [n, heads, dim]
        lse[:, run.queries] = part_lse[0]
    return output, lse


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    heads, groups = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for run in _cpu_runs(block, q.dtype):
        q_part, out, grad_part = (_heads_first(x, run.queries, heads) for x in (q, output, grad))
        k_part, v_part = (_heads_first(x, run.keys, heads) for x in (k, v))
        part_lse = lse[:, run.queries].unsqueeze(0).contiguous()
        dq_part, dk_part, dv_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_part, q_part, k_part, v_part, out, part_lse, 0.0, run.causal, attn_mask=run.mask
        )
        dq[run.queries] = dq_part[0].transpose(0, 1)
        for whole, part in ((dk, dk_part), (dv, dv_part)):
            # [1, heads, m, dim] -> [groups, heads / groups, m, dim] -> [m, groups, dim]
            whole[run.keys] = part[0].unflatten(0, (groups, -1)).sum(1).transpose(0, 1)
    return dq, dk, dv
