"""M1's partial rotary embedding in native transformers, which rotates whole heads: a rope type that it has, and rows.

M1 rotates the first r of a head's d dimensions, in pairs (i, i + r/2) by base^(-2i/r). Native transformers rotates
all d, in pairs (i, i + d/2) by base^(-2i/d) / factor_i with the rope type ``longrope``. So factor_i =
base^(2i/r - 2i/d) for the first r/2 pairs gives M1's angles, and a factor beyond fp32's reach gives the others an angle
of 0. The rows of q and k are dealt to the pairs accordingly, which changes no product of q and k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROPE_TYPE = "longrope"
UNROTATED = 1e38
"""Factor of a pair that is not rotated: its frequency is at most 1e-38, and 0 in fp32 with M1's bases."""
_CLOSE = 1e-6
"""Relative; fp32, which transformers computes in, is no finer."""
_KEYS = {
    "rope_type",
    "rope_theta",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
    "factor",
    "attention_factor",
}


def rope_parameters(*, base: float, rotated: int, head_dim: int, max_positions: int) -> dict[str, Any]:
    """Return what ``config.json`` says so that native transformers rotates the first ``rotated`` dimensions.

    Args:
        base: of the angles.
        rotated: dimensions, even and below ``head_dim``.
        head_dim: dimensions of a head, even.
        max_positions: as in ``max_position_embeddings``; both lists of factors are the same, so it decides nothing.
    """
    factors = _factors(base, rotated, head_dim)
    return {
        "rope_type": ROPE_TYPE,
        "rope_theta": base,
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": max_positions,
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def _factors(base: float, rotated: int, head_dim: int) -> list[float]:
    pairs = [base ** (2 * i / rotated - 2 * i / head_dim) for i in range(rotated // 2)]
    return pairs + [UNROTATED] * (head_dim // 2 - rotated // 2)


def rotated_dimensions(parameters: Mapping[str, Any], *, base: float, head_dim: int) -> int:
    """Read back how many dimensions are rotated.

    Args:
        parameters: ``rope_parameters`` of the type ``longrope``.
        base: its ``rope_theta``.
        head_dim: dimensions of a head.

    Raises:
        ValueError: they are not what :func:`rope_parameters` writes, but a real LongRoPE.
    """
    factors = parameters.get("short_factor")
    # A whole number in JSON can be beyond what a float holds; a power of a negative base is no real number.
    if base > 0 and isinstance(factors, list) and all(type(x) in (int, float) and x < 2 * UNROTATED for x in factors):
        rotated = 2 * sum(factor < UNROTATED / 2 for factor in factors)
        wanted = _factors(base, rotated, head_dim) if 0 < rotated < head_dim and len(factors) == head_dim // 2 else []
        same = wanted and all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(factors, wanted, strict=True))
        plain = parameters.get("attention_factor") == 1 and parameters.keys() <= _KEYS
        if same and plain and parameters.get("long_factor") == factors:
            return rotated
    raise ValueError(
        f"rope_parameters of the type {ROPE_TYPE} are not those that rotate the first dimensions of a head as M1 does: "
        "frequencies that change with the length have no counterpart here"
    )


def native_rows(weight: Tensor, *, head_dim: int, rotated: int) -> Tensor:
    """Put the rows of q or k [heads * head_dim, ...] into native transformers' order; a copy."""
    # [heads * head_dim, ...] -> [heads, head_dim, ...] and back
    return weight.view(-1, head_dim, *weight.shape[1:])[:, _order(head_dim, rotated)].view(weight.shape)


def our_rows(weight: Tensor, *, head_dim: int, rotated: int) -> Tensor:
    """Undo :func:`native_rows`; a copy."""
    back = _order(head_dim, rotated).argsort()
    # [heads * head_dim, ...] -> [heads, head_dim, ...] and back
    return weight.reshape(-1, head_dim, *weight.shape[1:])[:, back].view(weight.shape)


def _order(head_dim: int, rotated: int) -> Tensor:
    """For every row of a head in native transformers, M1's [head_dim]."""
    half, native_half = rotated // 2, head_dim // 2
    rest = torch.arange(rotated, head_dim, device="cpu")
    first, second = torch.arange(half, device="cpu"), torch.arange(half, rotated, device="cpu")
    return torch.cat((first, rest[: native_half - half], second, rest[native_half - half :]))
