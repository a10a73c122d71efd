"""Which implementation runs an op: the one place that chooses."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

NAMES = ("chunk", "naive", "triton")
_FASTEST: Mapping[str, str] = MappingProxyType({"cpu": "chunk", "cuda": "triton"})


def choose_backend(device: torch.device, name: str | None = None) -> str:
    """The implementation that runs on ``device``: ``name`` if given, else the fastest one.

    "naive" is the formula under autograd, "chunk" torch's operations with a backward pass of their own, "triton"
    kernels for GPUs. Every op that has a Triton form takes these names.

    Raises:
        ValueError: no implementation has this name, or none is known for this type of device.
    """
    if name is not None:
        if name not in NAMES:
            raise ValueError(f"unknown backend {name!r}: use one of {list(NAMES)}, or None")
        return name
    if device.type not in _FASTEST:
        raise ValueError(f"no kernels for device type {device.type!r}: use one of {sorted(_FASTEST)}")
    return _FASTEST[device.type]
