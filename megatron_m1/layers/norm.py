"""RMSNorms of M1: the block norm, and the lightning layer's full-width norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_m1.kernels.rmsnorm import gated_rms_norm, rms_norm

NormBuilder = Callable[..., nn.Module]


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, with the mark that sequence parallelism needs to sum its gradient.

    Args:
        config: gives ``params_dtype`` and ``sequence_parallel``.
        hidden_size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden_size]; returns its shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


def parameter_device(config: TransformerConfig) -> Any:
    """Where new parameters are allocated: the default device with ``use_cpu_initialization`` (meta, say), else the
    GPU."""
    return None if config.use_cpu_initialization else torch.cuda.current_device()


class FullWidthRMSNorm(nn.Module):
    """RMSNorm under a sigmoid gate, over a width that tensor parallelism splits: the mean square is summed over ranks.

    MiniMax-M1 normalises the concatenation of all heads (64 x 128), not each head (m1: modeling file, RMSNorm(8192)).

    Args:
        config: gives ``params_dtype``.
        width: full width, over all tensor ranks.
        eps: added to the mean square.
        tp_group: tensor-parallel group; its size divides ``width``.
        backend: form of ``gated_rms_norm``; None takes the fastest that the device has.
    """

    def __init__(
        self,
        config: TransformerConfig,
        width: int,
        eps: float,
        tp_group: torch.distributed.ProcessGroup,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.backend = backend
        self.width = width
        self.tp_group = tp_group
        local = width // tp_group.size()
        self.weight = nn.Parameter(torch.ones(local, dtype=config.params_dtype, device=parameter_device(config)))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise ``x`` [n, heads / tp, dim] and multiply by ``sigmoid(gate)``, shaped as ``x``, any strides.

        Statistics are fp32, the result has ``x``'s dtype.
        """
        add = None if self.tp_group.size() == 1 else self._add_over_ranks
        return gated_rms_norm(
            x, self.weight, gate, self.eps, width=self.width, add_over_ranks=add, backend=self.backend
        )

    def _add_over_ranks(self, sums: Tensor) -> Tensor:
        # Every rank's output depends on the total, so under autograd its gradient is summed over the ranks as well.
        total = reduce_from_tensor_model_parallel_region(sums, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(total, group=self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight's shard of the full width, for dist_checkpointing."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)
