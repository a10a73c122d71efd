"""What lightning attention accepts; each check raises a ValueError that names the bad value and the fix."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_m1.kernels.lightning.naive import state_dtype

INPUT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_heads(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> None:
    """Check q, k [X, H, Dk], v [X, H, Dv] (X tokens or sequences) and slopes [H].

    Raises:
        ValueError: shapes, dtypes or devices that do not go together; slopes that are negative, not finite, or want a
            gradient.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 3 or q.shape != k.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"shapes {shapes} do not go together: give q and k [T, H, Dk] and v [T, H, Dv]")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"shapes {shapes} hold nothing: every size must be at least 1")
    if q.dtype not in INPUT_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: give all three one floating dtype")
    if slopes.shape != q.shape[1:2]:
        raise ValueError(f"slopes have shape {tuple(slopes.shape)}: give one per head, [{q.shape[1]}]")
    if slopes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"slopes are {slopes.dtype}: keep them float32, they decide how long a state lives")
    if slopes.requires_grad:
        raise ValueError("slopes require a gradient, but decays are fixed: pass slopes.detach()")
    devices = {str(x.device) for x in (q, k, v, slopes)}
    if len(devices) > 1:
        raise ValueError(f"q, k, v and slopes are on {sorted(devices)}: move them to one device")
    # Reading a value from another device would wait for it, so only slopes on the CPU are looked at.
    if slopes.device.type == "cpu" and not bool(((slopes >= 0) & slopes.isfinite()).all()):
        raise ValueError(f"slopes are {slopes.tolist()}: give finite slopes >= 0, the decay is exp(-slope)")


def check_state(state: Tensor, name: str, q: Tensor, v: Tensor, count: int) -> None:
    """Check that ``state`` is [count, H, Dk, Dv] in the dtype of states for q and v, on their device.

    Raises:
        ValueError: another shape, dtype or device.
    """
    shape = (count, q.shape[1], q.shape[2], v.shape[2])
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(state.shape)}: give [N, H, Dk, Dv] = {list(shape)}")
    if state.dtype != state_dtype(q.dtype):
        raise ValueError(f"{name} is {state.dtype}: states are {state_dtype(q.dtype)} for {q.dtype} inputs")
    if state.device != q.device:
        raise ValueError(f"{name} is on {state.device}, q on {q.device}: move them to one device")


def check_cu_seqlens(cu_seqlens: Tensor | Sequence[int] | None, num_tokens: int) -> list[int]:
    """The document bounds of a pack of ``num_tokens`` as ints; None is one document.

    Raises:
        ValueError: not one-dimensional integers, not from 0, not strictly rising, or not ending at num_tokens.
    """
    if cu_seqlens is None:
        return [0, num_tokens]
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}: give int32 or int64 [N + 1]"
            )
        bounds = cu_seqlens.tolist()
    else:
        bounds = list(cu_seqlens)
    if len(bounds) < 2 or bounds[0] != 0:
        raise ValueError(f"cu_seqlens begins {bounds[:2]}: give N + 1 bounds of N >= 1 documents, beginning with 0")
    for document, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end <= start:
            raise ValueError(f"cu_seqlens puts document {document} at [{start}, {end}): bounds must rise strictly")
    if bounds[-1] != num_tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}, but the pack has {num_tokens} tokens")
    return bounds
