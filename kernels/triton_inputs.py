"""What the Triton kernels take."""

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_triton(x: Tensor) -> None:
    """Check that kernels exist for ``x``'s dtype and device.

    Raises:
        ValueError: float64, or a device that is no GPU (Triton's interpreter takes CPU tensors).
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"the triton backend has no {x.dtype}: give float32, bfloat16 or float16, or backend='chunk'")
    if x.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"the triton backend needs a GPU, but the inputs are on {x.device}: use backend='chunk', or for tests "
            "start Python with TRITON_INTERPRET=1"
        )


def dense_rows(x: Tensor) -> Tensor:
    """``x`` [T, H, D] itself if its last dimension is dense, as the kernels read it."""
    return x if x.stride(2) == 1 else x.contiguous()
