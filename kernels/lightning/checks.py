"""What lightning attention accepts; each check raises a ValueError that names the bad value and the fix."""

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from megatron_m1.kernels.lightning.naive import state_dtype

INPUT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_heads(q: Tensor | None, k: Tensor, v: Tensor, slopes: Tensor) -> None:
    """Check q, k [X, H, Dk], v [X, H, Dv] (X tokens or sequences; q None where there is none) and slopes [H].

    Raises:
        ValueError: shapes, dtypes or devices that do not go together; slopes that are negative, not finite, or want a
            gradient.
    """
    given = {"k": k, "v": v} if q is None else {"q": q, "k": k, "v": v}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
    if (
        any(x.dim() != 3 for x in given.values())
        or v.shape[:2] != k.shape[:2]
        or (q is not None and q.shape != k.shape)
    ):
        keys = "k" if q is None else "q and k"
        raise ValueError(f"shapes {shapes} do not go together: give {keys} [T, H, Dk] and v [T, H, Dv]")
    if 0 in k.shape or 0 in v.shape:
        raise ValueError(f"shapes {shapes} hold nothing: every size must be at least 1")
    if k.dtype not in INPUT_DTYPES or any(x.dtype != k.dtype for x in given.values()):
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in given.items())
        raise ValueError(f"dtypes {dtypes}: give {' and '.join(given)} one of float32, bfloat16, float16, float64")
    if not isinstance(slopes, Tensor):
        raise ValueError(f"slopes are a {type(slopes).__name__}: give a float32 tensor, one slope per head")
    if slopes.shape != k.shape[1:2]:
        raise ValueError(f"slopes have shape {tuple(slopes.shape)}: give one per head, [{k.shape[1]}]")
    if slopes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"slopes are {slopes.dtype}: keep them float32, they decide how long a state lives")
    if slopes.requires_grad:
        raise ValueError("slopes require a gradient, but decays are fixed: pass slopes.detach()")
    devices = {str(x.device) for x in (*given.values(), slopes)}
    if len(devices) > 1:
        raise ValueError(f"{', '.join(given)} and slopes are on {sorted(devices)}: move them to one device")
    # Reading a value from another device would wait for it, so only slopes on the CPU are looked at.
    if slopes.device.type == "cpu" and not bool(((slopes >= 0) & slopes.isfinite()).all()):
        raise ValueError(f"slopes are {slopes.tolist()}: give finite slopes >= 0, the decay is exp(-slope)")


def check_state(state: Tensor, name: str, q: Tensor, v: Tensor, count: int, of: str = "N") -> None:
    """Check that ``state`` is [count, H, Dk, Dv] in the dtype of states for q and v, on their device.

    ``of`` is what the count is called: N documents, B sequences, M slots.

    Raises:
        ValueError: another shape, dtype or device.
    """
    shape = (count, q.shape[1], q.shape[2], v.shape[2])
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(state.shape)}: give [{of}, H, Dk, Dv] = {list(shape)}")
    if state.dtype != state_dtype(q.dtype):
        raise ValueError(f"{name} is {state.dtype}: states are {state_dtype(q.dtype)} for {q.dtype} inputs")
    if state.device != q.device:
        raise ValueError(f"{name} is on {state.device}, q on {q.device}: move them to one device")


def whole_numbers(values: object, name: str, wanted: str) -> list[int]:
    """``values`` as a list of ints; numpy's are ints too.

    Raises:
        ValueError: no sequence, which is to hold what is ``wanted``; or something else among its members.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r}: give {wanted}")
    found: list[object] = list(values)
    wrong = [value for value in found if isinstance(value, bool) or not isinstance(value, SupportsIndex)]
    if wrong:
        raise ValueError(f"{name} holds {wrong[0]!r}, a {type(wrong[0]).__name__}: give ints")
    return [operator.index(value) for value in found if isinstance(value, SupportsIndex)]


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
        bounds = whole_numbers(cu_seqlens, "cu_seqlens", f"N + 1 ints, the last of them {num_tokens}")
    if len(bounds) < 2 or bounds[0] != 0:
        raise ValueError(f"cu_seqlens begins {bounds[:2]}: give N + 1 bounds of N >= 1 documents, beginning with 0")
    for document, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end <= start:
            raise ValueError(f"cu_seqlens puts document {document} at [{start}, {end}): bounds must rise strictly")
    if bounds[-1] != num_tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}, but the pack has {num_tokens} tokens: let it end there")
    return bounds
