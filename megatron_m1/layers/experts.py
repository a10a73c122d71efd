"""The local experts: megatron-core's parameters and checkpoints, and their products in passes of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn

from megatron_m1.kernels.expert_mlp.grouped import Grouped, grouped
from megatron_m1.kernels.expert_mlp.one_by_one import OneByOne, one_by_one
from megatron_m1.parallel.expert.layer import Experts


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


class LocalExperts(SequentialMLP):
    """``SequentialMLP``, same parameters and checkpoint; each expert is one operation. Its linears give their weights.

    Between expert-tensor ranks the token dispatcher gathers and reduces, so an expert's own work is local.
    """

    @property
    def is_grouped(self) -> bool:
        """Whether all of them are computed at once: in 16 bits on a GPU; else one by one."""
        weight = self.local_experts[0].linear_fc2.weight
        return bool(weight.is_cuda and Grouped.takes(weight))

    def weights(self) -> list[Tensor]:
        """fc1 [2 ffn / etp, hidden] and fc2 [hidden, ffn / etp] of every local expert in turn."""
        return [linear() for expert in self.local_experts for linear in (expert.linear_fc1, expert.linear_fc2)]

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
        compute = grouped if self.is_grouped else one_by_one
        return compute(permuted_local_hidden_states, permuted_probs, tokens_per_expert.tolist(), self.weights()), None


class ThroughAutograd:
    """``Experts`` of any module of megatron-core's, such as transformer-engine's grouped linears: autograd inside.

    The weights' gradients come with the others': nothing is left for later.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def forward(
        self, x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output [rows, hidden], and the graph."""
        with torch.enable_grad():
            inputs = (x.detach().requires_grad_(), scale.detach().requires_grad_())
            output, _ = self._module(inputs[0], torch.tensor(counts), inputs[1])
        return output.detach(), (output, *inputs)

    def keep(self, x: Tensor, scale: Tensor, counts: list[int], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The graph."""
        return self.forward(x, scale, counts, weights)[1]

    def backward(
        self, kept: tuple[Tensor, ...], grad: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Gradients of x, of scale, and the weights' own; None of weights that need none."""
        output, x, scale = kept
        wanted = [weight for weight in weights if weight.requires_grad]
        found = torch.autograd.grad(output, (x, scale, *wanted), grad, allow_unused=True)
        grad_x, grad_scale = (
            torch.zeros_like(given) if grad is None else grad for given, grad in zip((x, scale), found[:2], strict=True)
        )
        of_weights = iter(found[2:])
        return grad_x, grad_scale, [next(of_weights) if weight.requires_grad else None for weight in weights]

    def add_weight_gradients(self, pending: list[Tensor | None], totals: list[Tensor | None], *, more: bool) -> None:
        """Add them."""
        for index, grad in enumerate(pending):
            if grad is not None:
                wide = grad.float() if more and grad.dtype != torch.float64 else grad
                known = totals[index]
                totals[index] = wide if known is None else known.add_(wide)


def products_of(experts: Any) -> tuple[Experts, list[Tensor]]:
    """How the experts of a layer compute in passes, and their weights."""
    if isinstance(experts, LocalExperts):
        return Grouped() if experts.is_grouped else OneByOne(), experts.weights()
    return ThroughAutograd(experts), list(experts.parameters())
