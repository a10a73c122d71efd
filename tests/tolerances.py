"""The error that rounding explains where matrix products follow each other: an expert's MLP, and the whole model.

A float32 sum of k products is off by sqrt(k) u of its norm, as a random walk (``benchmarks/common/tolerances.py``, for
attention alone). What one product is off by goes through the next ones at its size, since norms, SiLU and
softmax hardly stretch it, and their own errors are independent of it: squares add up, so a chain of products is off by
sqrt(k_1 + k_2 + ...) u. All errors are root mean squares, relative to the norm of what is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from benchmarks.common.tolerances import UNIT
from megatron_m1.config import ModelConfig


def chained(sums: Iterable[int], dtype: torch.dtype = torch.float32, *, roundings: int = 0) -> float:
    """Of products one after the other, of ``sums`` terms each; 8 u at least, since few terms are no walk.

    In 16 bits the sums are still float32, and up to ``roundings`` results on the way to one number are rounded.
    """
    return max(8.0, sum(sums) ** 0.5) * UNIT[torch.float32] + roundings * UNIT[dtype]


def of_largest(error: float, count: int) -> float:
    """The largest of ``count`` errors as a share of the largest number, which is no smaller than their mean square.

    The largest of n normal variables is sqrt(2 ln n) of their deviation.
    """
    return (2.0 * math.log(max(count, 3))) ** 0.5 * error


def whole_model(model: ModelConfig, tokens: int, *, gradients: bool = False) -> float:
    """Two float32 computations of one model's logits, or gradients, in different orders.

    A layer's chain: two norms, q k v, scores, tokens, output, router, and an expert's two products; then the last norm
    and the head. A product's backward is two more of them, of as many terms.
    """
    hidden, head = model.hidden_size, model.kv_channels
    layer = 5 * hidden + head + tokens + model.num_attention_heads * head + model.moe_ffn_hidden_size
    chain = model.num_layers * layer + 2 * hidden
    both_sides = 2
    return chained([both_sides * (3 if gradients else 1) * chain])
