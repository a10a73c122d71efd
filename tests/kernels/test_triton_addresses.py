"""Offsets beyond 2^31 elements: a pack of a million tokens and 64 heads has 8.6e9 of them.

The tensors here have strides that reach as far, in memory of which only the pages that are touched exist. There is as
much of it in front of them: an offset that has wrapped around finds zeros there.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from megatron_m1.kernels.lightning import lightning_attention, lightning_attention_step
from megatron_m1.kernels.lightning.triton_config import walk_configs
from megatron_m1.kernels.lightning.triton_launch import Walk
from megatron_m1.kernels.lightning.triton_walk import chain
from megatron_m1.kernels.lightning.walk_plan import Segment
from megatron_m1.kernels.rmsnorm import gated_rms_norm

FAR = 2**31
HEADS, WIDTH = 3, 16
MAP_NORESERVE = 0x4000
"""Linux's value, which Python's mmap does not name before 3.13."""
SLOPES = torch.tensor([0.5, 0.01, 0.0])


def reserve(size: int, dtype: torch.dtype) -> Tensor:
    """``size`` zeros, and as many in front of them, that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, 2 * size * dtype.itemsize, flags), dtype=dtype)[size:]


def far_copy(x: Tensor, strides: tuple[int, int]) -> Tensor:
    """``x`` [T, H, D] with other strides by token and by head."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, (*strides, 1), strict=True))
    memory = reserve(size, x.dtype)
    return memory.as_strided(x.shape, (*strides, 1), memory.storage_offset()).copy_(x)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).half()


# The second chunk of 64 tokens begins at 2^31; or the third head does.
@pytest.mark.parametrize("strides", [(FAR // 64, WIDTH), (WIDTH, FAR // 2)], ids=["tokens", "heads"])
@pytest.mark.parametrize("reverse", [False, True])
def test_walk(strides: tuple[int, int], reverse: bool) -> None:
    tokens, slot = 66, 1 + FAR // (HEADS * WIDTH * WIDTH)
    silu = (False, True, True)
    config = walk_configs(WIDTH, WIDTH, torch.float16, 90, silu)[0]
    a, b, c, raw = (normal(tokens + i, HEADS, WIDTH)[i:] for i in range(4))
    near_out, near_states = torch.full_like(a, float("nan")), torch.randn(2, HEADS, WIDTH, WIDTH)
    far_states = reserve((slot + 2) * HEADS * WIDTH * WIDTH, torch.float32).view(-1, HEADS, WIDTH, WIDTH)
    far_states[slot] = near_states[0]

    near = Walk(config, a, b, c, SLOPES, reverse, False, silu)
    table = torch.tensor([Segment(0, tokens, 0, -1, 1)], dtype=torch.int32)
    near.launch(table, near_out, near_states, None, near_states, raw=raw)
    far_out = far_copy(torch.full_like(a, float("nan")), strides)
    far_a, far_b, far_c = (far_copy(x, strides) for x in (a, b, c))
    far = Walk(config, far_a, far_b, far_c, SLOPES, reverse, False, silu)
    table = torch.tensor([Segment(0, tokens, slot, -1, slot + 1)], dtype=torch.int32)
    far.launch(table, far_out, far_states, None, far_states, raw=far_copy(raw, strides))
    assert near_out.isfinite().all() and torch.equal(far_out, near_out)
    assert torch.equal(far_states[slot + 1], near_states[1])


def test_tokens_so_far_apart_that_a_chunk_ends_beyond() -> None:
    """Offsets within a chunk are 32-bit: what would overflow them is copied, inputs and the output's gradient."""
    tensors = [normal(66 + i, HEADS, WIDTH)[i:] for i in range(4)]
    results = []
    for move in (torch.clone, lambda rows: far_copy(rows, (FAR // 32, WIDTH))):
        *leaves, grad = (move(x) for x in tensors)
        q, k, v = (x.requires_grad_() for x in leaves)
        o = lightning_attention(q, k, v, SLOPES, backend="triton")
        results.append([o.detach(), *torch.autograd.grad(o, (q, k, v), grad)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_chain() -> None:
    size, count = 2048, 3
    first = FAR // size
    near = torch.randn(count, 1, size)
    far = reserve((first + count) * size, torch.float32).view(-1, 1, size)
    far[first:] = near
    table = reserve((first + count) * 5, torch.int32).view(-1, 5)
    table[first:, 1] = 7
    for carries, rows, at in ((near, table[first:], 0), (far, table, first)):
        chains = torch.tensor([[at, count]], dtype=torch.int32)
        chain[(2, 1, 1)](carries, SLOPES, rows, chains, 1, SIZE=size, BLOCK=1024)
    assert torch.equal(far[first:], near)


def test_step() -> None:
    q, k, v = (normal(3 + i, HEADS, WIDTH)[i:] for i in range(3))
    state = torch.randn(3, HEADS, WIDTH, WIDTH)
    far_q, far_k, far_v = (far_copy(x, (FAR // 2, WIDTH)) for x in (q, k, v))
    near_results = lightning_attention_step(q, k, v, SLOPES, state, backend="triton")
    far_results = lightning_attention_step(far_q, far_k, far_v, SLOPES, state, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(near_results, far_results, strict=True))


# The third token's row begins at 2^31, or the third head's does.
@pytest.mark.parametrize("strides", [(FAR // 2, WIDTH), (WIDTH, FAR // 2)], ids=["tokens", "heads"])
def test_norm(strides: tuple[int, int]) -> None:
    x, gate, grad = (normal(3 + i, HEADS, WIDTH)[i:] for i in range(3))
    weight = normal(HEADS * WIDTH)
    results = []
    for move in (torch.clone, lambda rows: far_copy(rows, strides)):
        rows, scale, opening = move(x).requires_grad_(), weight.clone().requires_grad_(), move(gate).requires_grad_()
        y = gated_rms_norm(rows, scale, opening, 1e-6, backend="triton")
        results.append([y.detach(), *torch.autograd.grad(y, (rows, scale, opening), move(grad))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
