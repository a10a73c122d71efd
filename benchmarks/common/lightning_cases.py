"""Inputs and comparisons of the lightning attention tests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_m1.kernels.lightning import layer_slopes, lightning_attention

HEADS, KEY_DIM, VALUE_DIM = 3, 6, 5
EXTREME = torch.stack([layer_slopes(64, 0, 80)[0], layer_slopes(64, 78, 80)[63], torch.tensor(200.0)])
"""M1's strongest decay, its weakest, and one that leaves nothing of a state."""
NAMES = ("o", "final_state", "dq", "dk", "dv", "d_initial_state")


@dataclass
class Case:
    """One call: its arguments, and the gradients that reach its two results."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor
    lengths: list[int]
    initial_state: Tensor | None
    grad_o: Tensor
    grad_final_state: Tensor | None

    @property
    def cu_seqlens(self) -> list[int]:
        """Bounds of the documents."""
        return [0, *itertools.accumulate(self.lengths)]

    def to(self, what: torch.dtype | torch.device) -> Case:
        """The same numbers in another dtype (slopes keep theirs), or on another device."""
        tensors = (self.q, self.k, self.v, self.initial_state, self.grad_o, self.grad_final_state)
        q, k, v, state, grad_o, grad_final = (x if x is None else x.to(what) for x in tensors)
        assert q is not None and k is not None and v is not None and grad_o is not None
        slopes = self.slopes if isinstance(what, torch.dtype) else self.slopes.to(what)
        return Case(q, k, v, slopes, self.lengths, state, grad_o, grad_final)

    def upcast(self) -> Case:
        """The same numbers in float64: what a form in lower precision is measured against."""
        return self.to(torch.float64)


def make_case(
    lengths: list[int],
    *,
    dtype: torch.dtype = torch.float64,
    slopes: Tensor | None = None,
    initial: bool = True,
    final: bool = True,
    dims: tuple[int, int] = (KEY_DIM, VALUE_DIM),
) -> Case:
    """Random inputs for documents of the given lengths; states in float64 for float64, else float32."""
    key_dim, value_dim = dims
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    slopes = layer_slopes(HEADS, 1, 8) if slopes is None else slopes

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

    tokens, heads = sum(lengths), slopes.numel()
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    state_shape = (len(lengths), heads, key_dim, value_dim)
    q, k = normal(tokens, heads, key_dim), normal(tokens, heads, key_dim)
    v, grad_o = normal(tokens, heads, value_dim), normal(tokens, heads, value_dim)
    state, grad_final = normal(*state_shape, of=state_dtype), normal(*state_shape, of=state_dtype)
    return Case(q, k, v, slopes, lengths, state if initial else None, grad_o, grad_final if final else None)


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """Results and all gradients of the public op, by the names in ``NAMES``."""
    leaves = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    if case.initial_state is not None:
        leaves.append(case.initial_state.detach().clone().requires_grad_())
    q, k, v = leaves[:3]
    state = leaves[3] if len(leaves) == 4 else None
    options: dict[str, Any] = dict(cu_seqlens=case.cu_seqlens, initial_state=state, backend=backend)
    if case.grad_final_state is None:
        o = lightning_attention(q, k, v, case.slopes, **options)
        results, grads = {"o": o}, [case.grad_o]
    else:
        o, final_state = lightning_attention(q, k, v, case.slopes, output_final_state=True, **options)
        results, grads = {"o": o, "final_state": final_state}, [case.grad_o, case.grad_final_state]
    gradients = torch.autograd.grad(list(results.values()), leaves, grads)
    return {name: x.detach() for name, x in results.items()} | dict(zip(NAMES[2:], gradients, strict=False))


def error_by_head(actual: Tensor, expected: Tensor) -> Tensor:
    """Norm of the difference of each head (dim 1)."""
    return (actual.double() - expected.double()).transpose(0, 1).flatten(1).norm(dim=1)


def assert_close(name: str, actual: Tensor, expected: Tensor, relative: float, more: Tensor | float = 0.0) -> None:
    """Compare head by head, so that a head with small numbers counts as much as one with large ones.

    Allowed is ``relative`` times the norm of what is expected of a head, and ``more``, given by head.
    """
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    error = error_by_head(actual, expected)
    scale = expected.double().transpose(0, 1).flatten(1).norm(dim=1)
    underflow = 0.0 if actual.dtype == torch.float64 else torch.finfo(torch.float32).tiny * actual.numel()
    # A NaN fails too, which "error > bound" would let pass.
    assert bool((error <= relative * scale + more + underflow).all()), (
        f"{name}: relative errors by head {(error / scale).tolist()}"
    )
