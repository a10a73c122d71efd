"""The SwiGLU MLP of one expert, weighted per token. README.md has the math; ``naive.py`` the truth."""

from torch import Tensor

from megatron_m1.kernels.expert_mlp.fused import FusedExpertMlp

__all__ = ["expert_mlp"]


def expert_mlp(x: Tensor, scale: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """``(scale * silu(x fc1_gate^T) * (x fc1_up^T)) fc2^T``, row by row.

    Args:
        x: tokens [m, hidden]; m may be 0.
        scale: router probability of each token, [m], float32 or ``x``'s dtype.
        fc1: [2 * ffn, hidden], ``x``'s dtype: the gate's rows, then the up projection's.
        fc2: [hidden, ffn], ``x``'s dtype.

    Returns:
        [m, hidden] in ``x``'s dtype. Differentiable in all arguments, once. Kept for the backward pass: ``x`` and
        ``x fc1^T``.

    Raises:
        ValueError: shapes not as above.
    """
    tokens, hidden = x.shape
    ffn = fc2.shape[1]
    if scale.shape != (tokens,) or fc1.shape != (2 * ffn, hidden) or fc2.shape != (hidden, ffn):
        shapes = ", ".join(str(list(t.shape)) for t in (x, scale, fc1, fc2))
        raise ValueError(f"x, scale, fc1, fc2 are {shapes}: give [m, hidden], [m], [2 ffn, hidden], [hidden, ffn]")
    result: Tensor = FusedExpertMlp.apply(x, scale, fc1, fc2)
    return result
