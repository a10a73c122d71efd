"""A mixture of SwiGLU experts behind a top-k router."""

from __future__ import annotations

from megatron_m1.config.resolved import ResolvedParallelConfig
from megatron_m1.config.tree import ModelConfig
from megatron_m1.shapes.kind import FfnShape, Message, Parameter, Share, check_divides

PADDED = 1 / 48
"""Of an expert's rows: on a CPU they are rounded up by a sixteenth at most, a 64th to a 32nd on average."""
ALIGNED = 8
"""On a GPU each expert's rows are rounded up to this."""


class MixtureOfExperts(FfnShape):
    """With hidden size h, inner width F and E experts: router [E, h]; of each, gate and up [2 F, h], down [h, F].

    The forward pass is ``topk (3 x 2 h F)`` for the experts and ``2 h E`` for the router.
    """

    def parameters(self, model: ModelConfig) -> list[Parameter]:
        """All parameters of one sub-layer."""
        hidden, inner = model.hidden_size, model.moe_ffn_hidden_size
        experts, used = model.num_moe_experts, model.moe_router_topk
        return [
            Parameter("router.weight", (experts, hidden), "router", is_fp32=True),
            Parameter("experts.experts.linear_fc1.weight", (2 * inner, hidden), "experts", "expert", experts, used),
            Parameter("experts.experts.linear_fc2.weight", (hidden, inner), "experts", "expert", experts, used),
        ]

    def flops_per_token(self, model: ModelConfig) -> int:
        """The experts that a token visits, and the router."""
        return sum(self.flops_parts(model).values())

    def flops_parts(self, model: ModelConfig) -> dict[str, int]:
        """Experts and router by themselves."""
        return {
            "experts": model.moe_router_topk * 6 * model.hidden_size * model.moe_ffn_hidden_size,
            "router": 2 * model.hidden_size * model.num_moe_experts,
        }

    def rows(self, model: ModelConfig, share: Share) -> float:
        """Pairs of token and expert that a rank computes if the experts are balanced, with what pads them."""
        pairs = share.outside * model.moe_router_topk * share.parallel.expert_tensor_parallel_size
        if not share.on_gpu:
            return pairs * (1 + PADDED)
        return pairs + ALIGNED * (model.num_moe_experts // share.parallel.expert_model_parallel_size / 2 + 1)

    def saved_bytes(self, model: ModelConfig, share: Share) -> int:
        """Input; of each pair of token and expert its row h, its first products 2 F / ETP, a probability; and indices.

        Of balanced experts: a rank whose experts get more than their share keeps as much more.
        """
        before = share.outside * model.hidden_size * share.itemsize
        parallel, topk = share.parallel, model.moe_router_topk
        # Of a token the scores and, for each choice, its index and probability.
        routing = share.outside * (4 * model.num_moe_experts + topk * (8 + 4 + 8))
        if "moe" in share.recomputed:
            # Token groups compute the experts' products again, and not the router.
            return before + (routing if parallel.moe_token_groups > 1 else 0)
        inner = 2 * model.moe_ffn_hidden_size // parallel.expert_tensor_parallel_size
        rows = self.rows(model, share) * ((model.hidden_size + inner) * share.itemsize + 4)
        return before + routing + share.outside * topk * (16 + 8) + int(rows)

    def working_bytes(self, model: ModelConfig, share: Share) -> int:
        """Gradients of the local experts' matrices; on a GPU a copy of the first ones, and gradients of all rows."""
        hidden, parallel = model.hidden_size, share.parallel
        inner = model.moe_ffn_hidden_size // parallel.expert_tensor_parallel_size
        experts = model.num_moe_experts // parallel.expert_model_parallel_size
        gradients = experts * 3 * inner * hidden * share.itemsize
        rows = self.rows(model, share) * (hidden + 6 * inner) * share.itemsize
        if not share.on_gpu:
            # One expert after the other.
            return gradients + int(rows / experts)
        return gradients + experts * 2 * inner * hidden * share.itemsize + int(rows)

    def exchange_bytes(self, model: ModelConfig, share: Share) -> int:
        """Rows that leave and rows that arrive; with token groups those of two groups, on their way and computed."""
        parallel = share.parallel
        if parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size == 1:
            return 0
        pairs = share.outside * model.moe_router_topk
        rows = pairs * (1 + parallel.expert_tensor_parallel_size)
        in_part = min(1.0, 2 / parallel.moe_token_groups)
        return int(rows * in_part) * model.hidden_size * share.itemsize

    def messages(self, model: ModelConfig, share: Share) -> list[Message]:
        """Rows and probabilities to the experts, rows back; gradients likewise; and counts. Of balanced experts."""
        ranks = share.parallel.expert_model_parallel_size * share.parallel.expert_tensor_parallel_size
        counts = 8 * model.num_moe_experts
        loads = Message("TP x CP", "all-reduce", counts, 0, is_repeated=False)
        is_balanced = model.moe_router_load_balancing_type == "aux_loss" and model.moe_aux_loss_coeff > 0
        own = [loads] if is_balanced else []
        if model.moe_token_dispatcher_type == "allgather":
            return [*own, *self._gathered(model, share, ranks)]
        groups = share.parallel.moe_token_groups
        own.append(Message("EP x ETP", "all-gather", counts * groups * ranks, 0, module="" if groups > 1 else "moe"))
        return [*own, *self._dispatched(model, share)]

    def _dispatched(self, model: ModelConfig, share: Share) -> list[Message]:
        pairs = share.outside * model.moe_router_topk
        rows, probabilities = pairs * model.hidden_size * share.itemsize, 4 * pairs
        tensor = share.parallel.expert_tensor_parallel_size
        # Token groups send a row once more beside its gradient, instead of a pass that is computed again.
        is_grouped = share.parallel.moe_token_groups > 1
        more = rows if is_grouped and "moe" in share.recomputed else 0
        module = "" if is_grouped else "moe"
        both = 2 * rows + probabilities
        return [
            Message("EP", "all-to-all", both, both + more, module),
            Message("ETP", "all-gather", tensor * (rows + probabilities), tensor * (rows + more), module),
            Message("ETP", "reduce-scatter", tensor * rows, tensor * (rows + probabilities), module),
        ]

    def _gathered(self, model: ModelConfig, share: Share, ranks: int) -> list[Message]:
        tokens = share.outside * ranks
        rows, scores = tokens * model.hidden_size * share.itemsize, 4 * tokens * model.num_moe_experts
        return [
            Message("EP x ETP", "all-gather", rows + scores * 5 / 4, rows, "moe"),
            Message("EP x ETP", "reduce-scatter", rows, rows + scores, "moe"),
        ]

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
