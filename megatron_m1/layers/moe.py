"""A mixture of SwiGLU experts, all of it megatron-core's but the router."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from torch import Tensor, nn

from megatron_m1.layers.engine import EngineConfig
from megatron_m1.layers.kind import LayerKind, Matrix
from megatron_m1.layers.router import Router
from megatron_m1.shapes.residual import inner_gain, output_gain


class MixtureOfExperts(LayerKind):
    """The kind ``moe``."""

    def spec(self, config: EngineConfig, provider: BackendSpecProvider) -> Any:
        """A builder of ``MoELayer``."""
        experts = provider.grouped_mlp_modules(config.moe_grouped_gemm)
        return partial(MoELayer, submodules=MoESubmodules(experts=experts, router=Router))

    def matrices(
        self, module: Any, prefix: str, config: EngineConfig, groups: ProcessGroupCollection
    ) -> Iterator[tuple[Tensor, Matrix]]:
        """The router, and of every local expert gate (w1), up (w3) and down (w2)."""
        model = config.model
        hidden, inner = model.hidden_size, model.moe_ffn_hidden_size
        first, last = inner_gain(model), output_gain(model)
        yield module.router.weight.data, Matrix(f"{prefix}.moe.router", model.num_moe_experts, hidden)
        weights = _expert_weights(module.experts, module.num_local_experts)
        for index, (fc1, fc2) in zip(module.local_expert_indices, weights, strict=True):
            held = fc2.shape[1]
            offset = groups.expt_tp.rank() * held
            name = f"{prefix}.moe.experts.{index}"
            yield fc1[:held], Matrix(f"{name}.w1", inner, hidden, first_row=offset, gain=first)
            yield fc1[held:], Matrix(f"{name}.w3", inner, hidden, first_row=offset, gain=first)
            yield fc2, Matrix(f"{name}.w2", hidden, inner, first_column=offset, gain=last)

    def expert_parameters(self, module: Any) -> Iterable[nn.Parameter]:
        """All of the experts', whichever implementation they are."""
        parameters: Iterable[nn.Parameter] = module.experts.parameters()
        return parameters


def _expert_weights(experts: Any, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    if hasattr(experts, "local_experts"):
        for expert in experts.local_experts:
            yield expert.linear_fc1.weight.data, expert.linear_fc2.weight.data
    else:  # one module for all local experts: transformer-engine's grouped linears
        for index in range(count):
            yield (
                getattr(experts.linear_fc1, f"weight{index}").data,
                getattr(experts.linear_fc2, f"weight{index}").data,
            )


def parameter_of_expert(stored: str, expert: int) -> str:
    """Name in the model of an expert's parameter, which a checkpoint keeps stacked with the others' as ``stored``."""
    return stored.replace(".experts.experts.", f".experts.local_experts.{expert}.")
