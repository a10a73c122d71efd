"""float32 products by oneDNN, which torch is built with and uses for bfloat16, but not for float32."""

import torch
from torch import Tensor

SMALLEST = 128**3
"""Multiplications of a product below which oneDNN's preparation outweighs its speed."""


def onednn_serves(a: Tensor, b: Tensor) -> bool:
    """Whether ``a @ b`` is a float32 product on the CPU, large enough, in a torch that has oneDNN."""
    return (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.shape[0] * a.shape[1] * b.shape[1] >= SMALLEST
        and torch.backends.mkldnn.is_available()
    )


def onednn_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a`` [m, k] times ``b`` [k, n]: [m, n]. Code is generated at the first product of each (m, k, n)."""
    m, k, n = *a.shape, b.shape[1]
    if a.stride(0) == 1 and m * k > n * k + m * n:
        # oneDNN takes the first factor by rows. Of a tall weight gradient G^T X it is cheaper to copy X and the result.
        return onednn_matmul(b.t(), a.t()).t().contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return product
