"""Which implementation runs lightning attention: the one place that knows their names."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from megatron_m1.kernels.lightning.chunk import chunk_lightning_attention
from megatron_m1.kernels.lightning.naive import naive_lightning_attention


class Backend(Protocol):
    """An implementation of ``lightning_attention``."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        cu_seqlens: Sequence[int],
        initial_state: Tensor | None,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Take checked arguments; return the output, and the final states or None if they are not asked for."""
        ...


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Sequence[int],
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    # Triton exists for Linux alone, and takes long to import.
    from megatron_m1.kernels.lightning.triton_attention import triton_lightning_attention

    return triton_lightning_attention(q, k, v, slopes, cu_seqlens, initial_state, output_final_state)


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {"naive": naive_lightning_attention, "chunk": chunk_lightning_attention, "triton": _triton}
)

_FASTEST: Mapping[str, str] = MappingProxyType({"cpu": "chunk", "cuda": "triton"})


def choose_backend(device: torch.device) -> str:
    """Name of the fastest implementation on ``device``.

    Raises:
        ValueError: no implementation is known for this type of device.
    """
    if device.type not in _FASTEST:
        raise ValueError(f"no lightning attention for device type {device.type!r}: use one of {sorted(_FASTEST)}")
    return _FASTEST[device.type]


def find_backend(name: str | None, device: torch.device) -> Backend:
    """The implementation called ``name``, or the fastest one on ``device`` when ``name`` is None.

    Raises:
        ValueError: no implementation has this name, or none is known for this type of device.
    """
    name = choose_backend(device) if name is None else name
    if name not in BACKENDS:
        raise ValueError(f"unknown lightning attention backend {name!r}: use one of {sorted(BACKENDS)}, or None")
    return BACKENDS[name]
