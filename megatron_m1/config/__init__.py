"""The configuration of a run: its tree, its files, its presets, and what is derived and checked."""

from megatron_m1.config.resolved import ResolvedConfig
from megatron_m1.config.tree import (
    PATH,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "PATH",
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ResolvedConfig",
    "RunConfig",
    "TrainConfig",
]
