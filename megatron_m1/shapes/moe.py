"""A mixture of SwiGLU experts behind a top-k router."""

from __future__ import annotations

from megatron_m1.config.resolved import ResolvedParallelConfig
from megatron_m1.config.tree import ModelConfig
from megatron_m1.shapes.kind import FfnShape, Parameter, check_divides


class MixtureOfExperts(FfnShape):
    """With hidden size h, inner width F and E experts: router [E, h]; of each, gate and up [2 F, h], down [h, F].

    The forward pass is ``topk (3 x 2 h F)`` for the experts and ``2 h E`` for the router.
    """

    def parameters(self, model: ModelConfig) -> list[Parameter]:
        """All parameters of one sub-layer."""
        hidden, inner = model.hidden_size, model.moe_ffn_hidden_size
        experts, used = model.num_moe_experts, model.moe_router_topk
        return [
            Parameter("router.weight", (experts, hidden), "router"),
            Parameter("experts.experts.linear_fc1.weight", (2 * inner, hidden), "experts", "expert", experts, used),
            Parameter("experts.experts.linear_fc2.weight", (hidden, inner), "experts", "expert", experts, used),
        ]

    def flops_per_token(self, model: ModelConfig) -> int:
        """The experts that a token visits, and the router."""
        experts = model.moe_router_topk * 6 * model.hidden_size * model.moe_ffn_hidden_size
        return experts + 2 * model.hidden_size * model.num_moe_experts

    def check(self, model: ModelConfig) -> None:
        """A token visits two experts or more, there are as many, and a bias has scores that it can be added to.

        Raises:
            ValueError: it does not, there are fewer, or it has not.
        """
        if model.moe_router_topk < 2:
            # megatron-core refuses it as well, when processes have started.
            raise ValueError(
                f"model.moe_router_topk = {model.moe_router_topk}: the softmax over the chosen experts is always 1 for "
                "a single one, whose router would learn nothing: use at least 2"
            )
        if model.moe_router_topk > model.num_moe_experts:
            raise ValueError(
                f"model.moe_router_topk = {model.moe_router_topk} is more than model.num_moe_experts = "
                f"{model.num_moe_experts}: lower it"
            )
        if model.moe_router_enable_expert_bias and model.moe_router_score_function != "sigmoid":
            raise ValueError(
                "model.moe_router_enable_expert_bias needs model.moe_router_score_function sigmoid, but it is "
                f"{model.moe_router_score_function}: change one of them"
            )

    def check_split(self, model: ModelConfig, parallel: ResolvedParallelConfig) -> None:
        """Expert ranks divide the experts, and those of expert tensor parallelism an expert's matrices.

        Raises:
            ValueError: they don't.
        """
        check_divides(
            "model.num_moe_experts",
            model.num_moe_experts,
            "expert_model_parallel_size",
            parallel.expert_model_parallel_size,
        )
        check_divides(
            "model.moe_ffn_hidden_size",
            model.moe_ffn_hidden_size,
            "expert_tensor_parallel_size",
            parallel.expert_tensor_parallel_size,
        )
