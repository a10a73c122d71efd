"""The three passes of an expert's MLP, each by itself, so that a caller may do something else in between.

Experts get another number of tokens at every step, and oneDNN generates code for every shape it meets. So rows are
rounded up with zeros to one of 16 counts per power of two, once, and stay so through all six products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from megatron_m1.kernels.matmul import matmul, matmul_add_


@dataclass(frozen=True)
class Kept:
    """What the forward pass leaves for the backward one."""

    x: Tensor | None
    """[m', hidden]: the tokens, zero rows after them; None where fc1 is frozen."""
    scale: Tensor
    """[m']"""
    projected: Tensor
    """[m', 2 ffn]: ``x fc1^T``."""
    rows: int
    """m, of which m' is the rounded-up count."""


type Factors = tuple[Tensor, Tensor]
"""[m', rows of the weight] and [m', columns]: the weight's gradient is the one's transpose times the other."""


@dataclass(frozen=True)
class Pending:
    """What the weights' gradients are products of; None where a weight needs none."""

    fc1: Factors | None
    """The gradient of ``x fc1^T``, and ``x``."""
    fc2: Factors | None
    """The output's gradient, and the scaled activations."""


def round_up_rows(rows: int) -> int:
    """Round ``rows`` up to a count of at most 5 significant bits: at most a sixteenth more."""
    step = 1 << max(rows.bit_length() - 5, 0)
    return -(-rows // step) * step


def keep(x: Tensor, scale: Tensor, fc1: Tensor) -> Kept:
    """What the backward pass needs of ``expert_mlp``'s arguments: a forward pass without its output."""
    rows = x.shape[0]
    extra = round_up_rows(rows) - rows if x.device.type == "cpu" else 0
    x, scale = pad(x, (0, 0, 0, extra)), pad(scale, (0, extra))
    return Kept(x if fc1.requires_grad else None, scale, matmul(x, fc1.t()), rows)


def forward_pass(x: Tensor, scale: Tensor, fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Kept]:
    """Output [m, hidden], and what to keep; arguments as in ``expert_mlp``."""
    kept = keep(x, scale, fc1)
    gate, up = kept.projected.chunk(2, dim=-1)
    weighted = (silu(gate).mul_(up) * kept.scale.unsqueeze(-1)).to(x.dtype)  # [m', ffn]
    # Shrunk in place: a slice is a view, and what a custom function returns must not be one if it is written to.
    return matmul(weighted, fc2.t()).resize_(kept.rows, x.shape[1]), kept


def data_pass(kept: Kept, fc1: Tensor, fc2: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Pending]:
    """Gradients of x [m, hidden] and of scale [m] from the output's [m, hidden], and what the weights' are made of.

    Weights whose ``requires_grad`` is false get none.
    """
    x, scale, projected = kept.x, kept.scale, kept.projected
    grad = pad(grad, (0, 0, 0, len(scale) - kept.rows))  # [m', hidden]: zero rows add nothing to the weights' gradients
    gate, up = projected.chunk(2, dim=-1)
    weights = scale.unsqueeze(-1)
    opened = torch.sigmoid(gate)
    activated = gate * opened  # silu(gate)
    hidden = activated * up
    grad_weighted = matmul(grad, fc2)  # [m', ffn]
    grad_scale = torch.linalg.vecdot(grad_weighted.to(scale.dtype), hidden.to(scale.dtype))
    second = (grad, hidden.mul_(weights)) if fc2.requires_grad else None
    grad_hidden = grad_weighted.mul_(weights)
    grad_projected = torch.empty_like(projected)
    grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
    torch.mul(grad_hidden, activated, out=grad_up)
    # The derivative of silu is s + a (1 - s), a = gate s; torch's own backward of it is not vectorised.
    torch.mul(grad_hidden.mul_(up), torch.lerp(activated, opened.new_ones(()), opened), out=grad_gate)
    first = (grad_projected, x) if fc1.requires_grad and x is not None else None
    return matmul(grad_projected, fc1)[: kept.rows], grad_scale[: kept.rows], Pending(first, second)


def weight_gradient(factors: Factors, total: Tensor | None = None) -> Tensor:
    """A weight's gradient, added to ``total`` in place where that is given."""
    a, b = factors
    return matmul(a.t(), b) if total is None else matmul_add_(total, a.t(), b)
