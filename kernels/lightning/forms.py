"""The implementations of lightning attention, by the names that ``kernels.choice`` chooses between."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from megatron_m1.kernels.choice import choose_backend
from megatron_m1.kernels.lightning.call import Call
from megatron_m1.kernels.lightning.chunk import chunk_lightning_attention
from megatron_m1.kernels.lightning.naive import naive_lightning_attention


class Form(Protocol):
    """An implementation of ``lightning_attention``."""

    def __call__(self, call: Call, /) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the final states or None if they are not asked for."""
        ...


def _triton(call: Call) -> tuple[Tensor, Tensor | None]:
    # Triton exists for Linux alone, and takes long to import.
    from megatron_m1.kernels.lightning.triton_attention import triton_lightning_attention

    return triton_lightning_attention(call)


FORMS: Mapping[str, Form] = MappingProxyType(
    {"naive": naive_lightning_attention, "chunk": chunk_lightning_attention, "triton": _triton}
)


def find_form(name: str | None, device: torch.device) -> Form:
    """The implementation called ``name``, or the fastest one on ``device`` when ``name`` is None.

    Raises:
        ValueError: see ``choose_backend``.
    """
    return FORMS[choose_backend(device, name)]
