"""Lightning attention: linear attention with a fixed decay, a gate and a norm inside."""

from __future__ import annotations

import os

from megatron_m1.config.tree import ModelConfig
from megatron_m1.shapes.kind import Message, MixerShape, Parameter, Share, parallel_linears

GROUP = "lightning attention"


class Lightning(MixerShape):
    """With hidden size h and inner width A = heads x kv_channels: q, k, v and gate [4 A, h], output [h, A], norm [A].

    The forward pass is ``5 x 2 h A`` for the matrices, and ``2 x 2 A kv_channels`` to update and read the state.
    """

    def parameters(self, model: ModelConfig) -> list[Parameter]:
        """All parameters of one sub-layer."""
        hidden, inner = model.hidden_size, model.num_attention_heads * model.kv_channels
        return [
            Parameter("linear_qkvg.weight", (4 * inner, hidden), GROUP, "tensor"),
            Parameter("norm.weight", (inner,), GROUP, "tensor"),
            Parameter("linear_proj.weight", (hidden, inner), GROUP, "tensor"),
        ]

    def flops_per_token(self, model: ModelConfig) -> int:
        """Projections and the recurrence."""
        inner = model.num_attention_heads * model.kv_channels
        return 10 * model.hidden_size * inner + 4 * inner * model.kv_channels

    def saved_bytes(self, model: ModelConfig, share: Share) -> int:
        """Input; projection 4 A; q, k and v after SiLU 3 A; what was attended A and a sum a token; gated output A.

        Triton's kernels apply SiLU to what they load, and keep no q, k, v, unless states come from other ranks.
        """
        inner = model.num_attention_heads * model.kv_channels // share.tensor
        before = share.outside * model.hidden_size * share.itemsize
        row = inner * share.itemsize
        if "core_attn" in share.recomputed:
            return before + share.tokens * 5 * row
        widths = 6 if share.on_gpu and not share.entering_states else 9
        return before + share.tokens * (widths * row + 4)

    def working_bytes(self, model: ModelConfig, share: Share) -> int:
        """Gradients of the matrices, of the projection twice (by parts and put together) and of what was attended."""
        inner = model.num_attention_heads * model.kv_channels // share.tensor
        return (5 * inner * model.hidden_size + share.tokens * 9 * inner) * share.itemsize

    def exchange_bytes(self, model: ModelConfig, share: Share) -> int:
        """LASP+: the states that all context-parallel ranks send, and this rank's."""
        ranks = share.parallel.context_parallel_size
        return (ranks + 1) * share.entering_states * self.state_bytes(model) // share.tensor

    def messages(self, model: ModelConfig, share: Share) -> list[Message]:
        """Besides the linears' the norm's sums, and the states of LASP+, which a recomputed pass keeps."""
        states = share.parallel.context_parallel_size * share.entering_states * self.state_bytes(model) // share.tensor
        sums = 4 * share.tokens
        return [
            *parallel_linears(model, share),
            Message("TP", "all-reduce", sums, sums, module="core_attn"),
            Message("CP", "all-gather", states, states, is_repeated=False),
        ]

    def state_bytes(self, model: ModelConfig) -> int:
        """An fp32 matrix a head."""
        return 4 * model.num_attention_heads * model.kv_channels**2

    def check_device(self, model: ModelConfig, *, precision: str, has_gpu: bool) -> None:
        """Triton's kernels need a GPU.

        Raises:
            ValueError: there is none.
        """
        # Triton's own variable: its interpreter runs kernels on a CPU, which is for tests.
        if model.lightning_backend == "triton" and not has_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("model.lightning_backend = triton needs GPUs, and there are none: use auto or chunk")
