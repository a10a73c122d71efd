"""The product of two matrices, by the library that is fastest where they are. README.md says why there is a choice.

``naive.py`` has torch's own product, ``onednn.py`` the other library's, ``precision.py`` the switch of TF32.
"""

from torch import Tensor

from megatron_m1.kernels.matmul.naive import naive_matmul
from megatron_m1.kernels.matmul.onednn import onednn_matmul, onednn_serves
from megatron_m1.kernels.matmul.precision import ieee_fp32_matmul

__all__ = ["ieee_fp32_matmul", "matmul", "matmul_add_"]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for two matrices; not differentiable, for use inside autograd functions.

    Args:
        a: [m, k], any strides.
        b: [k, n], ``a``'s dtype and device, any strides.

    Returns:
        [m, n] in their dtype, contiguous; float32 products are summed in float32.
    """
    return onednn_matmul(a, b) if onednn_serves(a, b) else naive_matmul(a, b)


def matmul_add_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add ``a @ b`` to ``total`` in place; not differentiable, for use inside autograd functions.

    Args:
        total: [m, n], any strides; in ``a``'s dtype, or wider: then the product is rounded once, to ``a``'s.
        a: [m, k], any strides.
        b: [k, n], ``a``'s dtype and device, any strides.

    Returns:
        ``total``.
    """
    if total.dtype != a.dtype or onednn_serves(a, b):
        return total.add_(matmul(a, b))
    return total.addmm_(a, b)
