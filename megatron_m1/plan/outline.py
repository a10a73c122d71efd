"""The whole plan of a configuration on some GPUs: memory, work, traffic, time; and what would let it fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_m1.config import Config, ResolvedConfig
from megatron_m1.config.resolve import data_parallel_size, resolve, resolve_mesh
from megatron_m1.plan.flops import flops_by_part
from megatron_m1.plan.hardware import Gpu, Hardware
from megatron_m1.plan.memory import PARTS, StageMemory, stage_memory
from megatron_m1.plan.step_time import StepTime, step_times
from megatron_m1.plan.traffic import Traffic, stage_traffic

GIB = 2**30


@dataclass(frozen=True)
class Outline:
    """What is planned for one configuration."""

    config: ResolvedConfig
    world_size: int
    gpu: Gpu
    memory: list[StageMemory]
    """Of every pipeline rank."""
    usable: float
    """Bytes of a GPU's memory that a plan may take."""
    flops: dict[str, float]
    """Of a token, forward and backward, by part."""
    traffic: list[list[Traffic]]
    """Of every pipeline rank, in a step."""
    fastest: StepTime
    slowest: StepTime

    @property
    def fullest(self) -> int:
        """The pipeline rank that holds most."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def fits(self) -> bool:
        """Whether every rank's memory suffices."""
        return self.memory[self.fullest].total <= self.usable

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.tokens_per_step

    @property
    def run_tokens(self) -> int:
        """Of the whole run."""
        return self.tokens * self.config.train.max_steps

    def utilisation(self, seconds: float) -> float:
        """MFU of a step that takes ``seconds``."""
        useful = sum(self.flops.values()) * self.tokens
        return useful / (seconds * self.world_size * self.gpu.bf16_tflops * 1e12)

    def days(self, seconds: float) -> float:
        """Of the whole run, if a step takes ``seconds``."""
        return self.config.train.max_steps * seconds / 86400

    def refusal(self) -> str:
        """Why it does not fit: the fullest stage, and its largest parts."""
        memory = self.memory[self.fullest]
        parts = sorted(((getattr(memory, name), name) for name in PARTS), reverse=True)
        largest = ", ".join(f"{size / GIB:.1f} {name}" for size, name in parts[:3])
        return (
            f"does not fit: stage {self.fullest} needs {memory.total / GIB:.1f} GiB of {self.usable / GIB:.1f} "
            f"({self.gpu.name} has {self.gpu.memory_gib:g}), of which {largest}"
        )

    def as_json(self) -> dict[str, Any]:
        """Bytes, FLOPs, seconds and shares, without the assumptions."""
        ends = {"fastest": self.fastest, "slowest": self.slowest}
        return {
            "gpus": self.world_size,
            "gpu": asdict(self.gpu),
            "fits": self.fits,
            "usable_bytes": self.usable,
            "memory_bytes": [asdict(memory) | {"total": memory.total} for memory in self.memory],
            "flops_per_token": self.flops,
            "traffic_bytes": [[asdict(each) for each in stage] for stage in self.traffic],
            "step": {
                name: asdict(end)
                | {
                    "tokens_per_second": self.tokens / end.seconds,
                    "mfu": self.utilisation(end.seconds),
                    "days": self.days(end.seconds),
                }
                for name, end in ends.items()
            },
            "tokens_per_step": self.tokens,
            "tokens": self.run_tokens,
        }


def usable_bytes(gpu: Gpu, hardware: Hardware) -> float:
    """What a plan may take of a GPU's memory."""
    assert gpu.memory_gib is not None
    return gpu.memory_gib * GIB * hardware.assumptions["memory"].low


def outline(config: ResolvedConfig, world_size: int, gpu: Gpu, hardware: Hardware) -> Outline:
    """Plan ``config``, which is resolved for ``world_size`` GPUs of one kind."""
    assert gpu.node is not None
    fastest, slowest = step_times(config, world_size, gpu, hardware)
    return Outline(
        config=config,
        world_size=world_size,
        gpu=gpu,
        memory=stage_memory(config, world_size, on_gpu=True),
        usable=usable_bytes(gpu, hardware),
        flops=flops_by_part(config.model, config.data.seq_length),
        traffic=stage_traffic(config, world_size, on_gpu=True, node=gpu.node),
        fastest=fastest,
        slowest=slowest,
    )


def with_length(config: Config, length: int, world_size: int) -> Config:
    """The configuration with packs of another length, and as many tokens in a step and in the run as can be.

    The packs of a step are a multiple of those that the mesh deals out at a time, and at least one of them.

    Raises:
        ValueError: the mesh has a size that is none, or its stages can't be laid out.
    """
    changed = copy.deepcopy(config)
    changed.data.seq_length = length
    parallel = resolve_mesh(config, has_gpu=True)
    every = max(1, data_parallel_size(parallel, world_size))
    if parallel.virtual_pipeline_model_parallel_size:
        every *= parallel.pipeline_model_parallel_size
    changed.train.global_batch_size = max(1, round(config.tokens_per_step / length / every)) * every
    assert config.train.max_steps is not None, "a plan is of so many steps"
    tokens = config.tokens_per_step * config.train.max_steps
    changed.train.max_steps = max(1, round(tokens / changed.tokens_per_step))
    return changed


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {"recompute_granularity": None},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "core_attn and moe": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_num_layers": 1},
}
"""The choices of recomputation, and what they set."""


def recompute_choices(config: ResolvedConfig, world_size: int) -> dict[str, StageMemory]:
    """Memory of the fullest stage with each choice of recomputation."""
    found = {}
    for name, values in RECOMPUTE.items():
        changed = copy.deepcopy(config)
        for field, value in values.items():
            setattr(changed.train, field, value)
        found[name] = max(stage_memory(changed, world_size, on_gpu=True), key=lambda memory: memory.total)
    return found


def smallest_change(asked: Config, world_size: int, gpu: Gpu, hardware: Hardware) -> str | None:
    """What lets a configuration fit and makes it slower by the least; in words, None if nothing does that is tried.

    Tried are the choices of recomputation, and each size of the mesh, doubled up to five times; where none of them is
    enough, each size with each choice.
    """
    sizes = list(_sizes(asked))
    alone = [*_choices(asked), *sizes]
    both = ((f"{words}, {more}", changed) for words, size in sizes for more, changed in _choices(size))
    for changes in (alone, both):
        best: tuple[float, str] | None = None
        for words, changed in changes:
            seconds = _seconds_if_it_fits(changed, world_size, gpu, hardware)
            if seconds is not None and (best is None or seconds < best[0]):
                best = seconds, words
        if best is not None:
            return best[1]
    return None


def _seconds_if_it_fits(changed: Config, world_size: int, gpu: Gpu, hardware: Hardware) -> float | None:
    """The middle of a step's range; None where it does not fit, or is no configuration."""
    try:
        config = resolve(changed, world_size, has_gpu=True)
    except ValueError:
        return None
    needs = max(memory.total for memory in stage_memory(config, world_size, on_gpu=True))
    if needs > usable_bytes(gpu, hardware):
        return None
    fastest, slowest = step_times(config, world_size, gpu, hardware)
    return (fastest.seconds + slowest.seconds) / 2


def _choices(asked: Config) -> Iterator[tuple[str, Config]]:
    for values in RECOMPUTE.values():
        changed = copy.deepcopy(asked)
        for field, value in values.items():
            setattr(changed.train, field, value)
        yield ", ".join(f"train.{field} {_spelled(value)}" for field, value in values.items()), changed


def _sizes(asked: Config) -> Iterator[tuple[str, Config]]:
    for axis in ("tensor_model", "context", "expert_model", "expert_tensor", "pipeline_model"):
        field = f"{axis}_parallel_size"
        for times in (2, 4, 8, 16, 32):
            changed = copy.deepcopy(asked)
            size = times * (getattr(asked.parallel, field) or 1)
            setattr(changed.parallel, field, size)
            words = f"parallel.{field} {size}"
            if axis == "pipeline_model" and asked.parallel.pipeline_model_parallel_layout is not None:
                changed.parallel.pipeline_model_parallel_layout = None
                words += " without a layout"
            yield words, changed


def _spelled(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return "null" if value is None else str(value)
