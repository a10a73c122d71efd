"""The FP32 language-model head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_m1.kernels.matmul import matmul


@contextmanager
def ieee_fp32_matmul() -> Iterator[None]:
    """Matrix products of fp32 tensors in full fp32 inside the block, whatever the process-wide TF32 switch says."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Fp32Linear(torch.autograd.Function):
    """``x @ weight.T`` with TF32 off in forward and in backward, where autograd would run outside the block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with ieee_fp32_matmul():
            return matmul(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        with ieee_fp32_matmul():
            return matmul(grad, weight), matmul(grad.t(), x)


class Fp32OutputLayer(tensor_parallel.ColumnParallelLinear):
    """Vocabulary-parallel head whose weight, products and logits are fp32 in a bf16 model, with TF32 off.

    MiniMax-M1 needed it for RL: the correlation of training and inference probabilities rose from 0.987 to 0.997
    (MiniMax-M1 report, arXiv 2506.13585, section 3.2).
    """

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Logits of this rank's share of the vocabulary.

        Args:
            input_: [n (/ tp with sequence parallel), 1, hidden], any float dtype.
            weight: must be None: the head is not tied to the embedding.
            runtime_gather_output: must be falsy: logits stay split over the tensor ranks.

        Returns:
            fp32 [n, 1, vocab / tp] and no bias.
        """
        assert weight is None and not runtime_gather_output
        if self.sequence_parallel:
            gathered = tensor_parallel.gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            gathered = tensor_parallel.copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        # [n, 1, hidden] -> [n, hidden] -> [n, vocab / tp] -> [n, 1, vocab / tp]
        logits = _Fp32Linear.apply(gathered.float().flatten(0, 1), self.weight)
        return logits.unsqueeze(1), None
