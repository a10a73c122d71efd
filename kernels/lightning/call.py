"""The checked arguments of lightning attention: what every form of it takes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """Arguments as in ``lightning_attention``, which has checked them."""

    q: Tensor
    """[T, H, Dk]"""
    k: Tensor
    """[T, H, Dk]"""
    v: Tensor
    """[T, H, Dv]"""
    slopes: Tensor
    """[H]"""
    cu_seqlens: tuple[int, ...]
    """[N + 1]"""
    initial_state: Tensor | None = None
    """[N, H, Dk, Dv]; None is zero."""
    output_final_state: bool = False
