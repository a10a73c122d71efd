"""Lightning attention: linear attention with a fixed decay, a gate and a norm inside."""

from __future__ import annotations

import os

from megatron_m1.config.tree import ModelConfig
from megatron_m1.shapes.kind import MixerShape, Parameter

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
