"""megatron-core's parallel linears and experts, computing their products with ``kernels.matmul``."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_m1.kernels.expert_mlp import expert_mlp
from megatron_m1.kernels.matmul import matmul


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        return matmul(grad, weight), matmul(grad.t(), x)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [..., in] times ``weight`` [out, in] transposed: [..., out], differentiable in both."""
    # [..., in] -> [n, in] -> [n, out] -> [..., out]
    product: Tensor = _Linear.apply(x.flatten(0, -2), weight)
    return product.view(*x.shape[:-1], -1)


class CpuColumnParallelLinear(ColumnParallelLinear):
    """``ColumnParallelLinear``; only products without a collective differ."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **how: Any) -> Tensor:
        if how["sequence_parallel"] or how["allreduce_dgrad"]:
            # The library's own function overlaps these collectives with the products.
            return super()._forward_impl(input, weight, **how)
        return linear(input, weight)


class CpuRowParallelLinear(RowParallelLinear):
    """``RowParallelLinear``; only the product differs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **how: Any) -> Tensor:
        return linear(input, weight)


class ColumnParallelWeight(ColumnParallelLinear):
    """The matrix of a ``ColumnParallelLinear``, returned by calling it.

    Reading the attribute would not run the module's hooks, in which DDP waits for parameters that are gathered late.
    """

    def forward(self) -> Tensor:
        """This rank's rows, [out / tp, in]."""
        return self.weight


class RowParallelWeight(RowParallelLinear):
    """The matrix of a ``RowParallelLinear``, returned by calling it, for the same reason."""

    def forward(self) -> Tensor:
        """This rank's columns, [out, in / tp]."""
        return self.weight


class CpuExperts(SequentialMLP):
    """``SequentialMLP``, same parameters and checkpoint; each expert is one operation. Its linears give their weights.

    Between expert-tensor ranks the token dispatcher gathers and reduces, so an expert's own work is local.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Run every local expert on its tokens.

        Args:
            permuted_local_hidden_states: [tokens, hidden], sorted by expert.
            tokens_per_expert: int [local experts].
            permuted_probs: router probability of each token, [tokens].

        Returns:
            [tokens, hidden] (a partial sum with expert tensor parallelism), and no bias.
        """
        counts = tokens_per_expert.tolist()
        outputs = [
            expert_mlp(tokens, probs, expert.linear_fc1(), expert.linear_fc2())
            for expert, tokens, probs in zip(
                self.local_experts,
                permuted_local_hidden_states.split(counts),
                permuted_probs.split(counts),
                strict=True,
            )
        ]
        return torch.cat(outputs), None
