"""A mixture of SwiGLU experts, all of it megatron-core's but the router."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor, nn

from megatron_m1.layers.engine import EngineConfig
from megatron_m1.layers.experts import products_of
from megatron_m1.layers.kind import LayerKind, Matrix
from megatron_m1.layers.router import Router
from megatron_m1.parallel.expert.layer import Call, expert_layer
from megatron_m1.parallel.expert.links import GroupLink, Links
from megatron_m1.parallel.expert.plan import Ranks, plan_exchange
from megatron_m1.shapes.residual import inner_gain, output_gain


class TokenGroupMoELayer(MoELayer):
    """``MoELayer`` whose exchanges run by token groups beside the experts' products (``parallel/expert/schedule.py``).

    Its router, experts, parameters and checkpoint are the stock layer's. ``recompute_modules: [moe]`` recomputes the
    experts' products inside the one function, and not the router.
    """

    config: EngineConfig

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any) -> None:
        groups = get_default_pg_collection() if pg_collection is None else pg_collection
        super().__init__(*args, pg_collection=groups, **kwargs)
        expert, tensor, both = (
            group if group.size() > 1 else None for group in (groups.ep, groups.expt_tp, groups.tp_ep)
        )
        self._ranks = Ranks(expert, tensor, both)
        self._links = Links(*(None if group is None else GroupLink(group) for group in (expert, tensor)))

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """See ``MoELayer.forward``.

        Args:
            hidden_states: [n, 1, hidden], this rank's tokens.
            intermediate_tensors: of CUDA graphs, which this layer does not support.
            padding_mask: bool [1, n], true for padding.

        Returns:
            [n, 1, hidden], and no bias.
        """
        assert intermediate_tensors is None, "CUDA graphs are not captured"
        mask = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        probs, routing_map = self.route(hidden_states, mask)
        experts, weights = products_of(self.experts)
        plan = plan_exchange(routing_map, self.config.moe_token_groups, self._ranks)
        call = Call(plan, self._links, experts, recompute=self.moe_layer_recompute and self.training)
        # [n, 1, hidden] -> [n, hidden] -> [n, 1, hidden]
        output = expert_layer(hidden_states.flatten(0, 1), probs, weights, call)
        return output.view_as(hidden_states), None


class MixtureOfExperts(LayerKind):
    """The kind ``moe``."""

    def spec(self, config: EngineConfig, provider: BackendSpecProvider) -> Any:
        """A builder of ``MoELayer``."""
        experts = provider.grouped_mlp_modules(config.moe_grouped_gemm)
        layer = TokenGroupMoELayer if config.moe_token_groups > 1 else MoELayer
        return partial(layer, submodules=MoESubmodules(experts=experts, router=Router))

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
