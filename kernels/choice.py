"""Which implementation runs an op: the one place that chooses."""

import torch

NAMES = ("chunk", "naive", "triton")


def choose_backend(device: torch.device, name: str | None = None) -> str:
    """The implementation that runs on ``device``: ``name`` if given, else "triton" on GPUs and "chunk" elsewhere.

    "naive" is the formula under autograd, "chunk" torch's operations with a backward pass of their own, "triton"
    kernels for GPUs. Every op that has a Triton form takes these names.

    Raises:
        ValueError: no implementation has this name.
    """
    if name is None:
        return "triton" if device.type == "cuda" else "chunk"
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: use one of {list(NAMES)}, or None")
    return name
