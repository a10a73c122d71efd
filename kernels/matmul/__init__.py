"""The product of two matrices, by the library that is fastest where they are. README.md says why there is a choice.

``naive.py`` has torch's own product, ``onednn.py`` the other library's.
"""

from torch import Tensor

from megatron_m1.kernels.matmul.naive import naive_matmul
from megatron_m1.kernels.matmul.onednn import onednn_matmul, onednn_serves

__all__ = ["matmul"]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for two matrices; not differentiable, for use inside autograd functions.

    Args:
        a: [m, k], any strides.
        b: [k, n], ``a``'s dtype and device, any strides.

    Returns:
        [m, n] in their dtype, contiguous; float32 products are summed in float32.
    """
    return onednn_matmul(a, b) if onednn_serves(a, b) else naive_matmul(a, b)
