"""The one adapter to what transformer-engine and NVIDIA apex offer, found at run time."""

from __future__ import annotations

from functools import partial
from typing import Literal

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder

from megatron_m1.layers.experts import ColumnParallelWeight, LocalExperts, RowParallelWeight
from megatron_m1.layers.linear import CpuColumnParallelLinear, CpuRowParallelLinear
from megatron_m1.layers.norm import NormBuilder, RMSNorm

Implementation = Literal["local", "transformer_engine"]


class LocalProvider(LocalSpecProvider):
    """megatron-core's own torch modules, with a norm that works under sequence parallelism."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> NormBuilder:
        """The block norm's class."""
        return RMSNorm

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> ExpertsBuilder:
        """Builder of a layer's local experts, which compute in passes of ours."""
        submodules = MLPSubmodules(linear_fc1=ColumnParallelWeight, linear_fc2=RowParallelWeight)
        return partial(LocalExperts, submodules=submodules)


class CpuProvider(LocalProvider):
    """The local modules, their products computed by ``kernels.matmul``."""

    def column_parallel_linear(self) -> type:
        """Linear split over its outputs."""
        return CpuColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Linear split over its inputs."""
        return CpuRowParallelLinear


def spec_provider(implementation: Implementation, *, on_gpu: bool) -> BackendSpecProvider:
    """Return the classes of linears, norms and experts for ``implementation`` on a GPU or elsewhere."""
    if implementation == "local":
        return LocalProvider() if on_gpu else CpuProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
