"""A configuration with nothing left to derive: what ``resolve`` returns, and what everything that runs takes.

Each class narrows the types of the fields that ``resolve`` fills in. What was asked stays beside what it became, for a
run's ``config.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_m1.config.tree import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig


@dataclass(kw_only=True)
class ResolvedModelConfig(ModelConfig):
    """``ModelConfig`` with its derived fields."""

    residual_alpha: float
    transformer_impl: Literal["local", "transformer_engine"]


@dataclass(kw_only=True)
class ResolvedParallelConfig(ParallelConfig):
    """``ParallelConfig`` with its derived fields."""

    expert_tensor_parallel_size: int
    sequence_parallel: bool
    distributed_backend: Literal["nccl", "gloo"]


@dataclass(kw_only=True)
class ResolvedDataConfig(DataConfig):
    """``DataConfig`` with its derived fields."""

    cache_folder: str


@dataclass(kw_only=True)
class ResolvedTrainConfig(TrainConfig):
    """``TrainConfig`` with its derived fields."""

    max_steps: int
    precision: Literal["fp32", "bf16"]


@dataclass(kw_only=True)
class ResolvedConfig(Config):
    """A whole run, ready to start."""

    model: ResolvedModelConfig
    parallel: ResolvedParallelConfig
    data: ResolvedDataConfig
    train: ResolvedTrainConfig
    asked: Config = field(compare=False, repr=False)
    """Before anything was derived, as the stage in which the run goes on has it; no part of the tree."""
    recipe: Config = field(compare=False, repr=False)
    """The whole run as it was read; no part of the tree, and ``asked`` without stages."""
    stage: int = field(default=0, compare=False)
    """Index of the stage that this is the configuration of; no part of the tree."""

    @property
    def padded_pack_tokens(self) -> int:
        """Tokens of a pack once its end is padded to what context and tensor parallelism divide."""
        multiple = self.parallel.context_parallel_size * self.parallel.tensor_model_parallel_size
        return -(-self.data.seq_length // multiple) * multiple
