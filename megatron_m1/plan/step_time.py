"""How long a step takes, as a range: products at a share of the peak, messages at a share of the links, the pipeline.

The lower end takes the optimistic share of everything (``hardware.yaml``) and hides behind products what may be hidden,
the upper end the pessimistic shares, and hides nothing. It is a model of throughput: latencies, the slowest GPU of
thousands, reading of data, checkpoints and validation are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_m1.config import ModelConfig, ResolvedConfig
from megatron_m1.config.pipeline import StageLayers, plan_stages
from megatron_m1.plan.hardware import Gpu, Hardware
from megatron_m1.plan.memory import micro_batches
from megatron_m1.plan.schedule import bubble
from megatron_m1.plan.traffic import Traffic, stage_traffic
from megatron_m1.shapes.kind import MixerShape
from megatron_m1.shapes.registry import FFNS, MIXERS, layer_ffns, layer_mixers

type End = Literal["low", "high"]
"""Of the shares: pessimistic, optimistic."""

PER_STEP = {"DP x CP", "EDP"}
"""Groups whose messages are sent once a step; the others' go with every micro-batch."""


@dataclass(frozen=True)
class StepTime:
    """One end of the range."""

    seconds: float
    computing: float
    """Of the busiest pipeline rank, with what is computed again."""
    exchanging: float
    """Messages of its micro-batches that nothing hides."""
    waiting: float
    """For other pipeline ranks."""
    reducing: float
    """Gradients and parameters that nothing hides."""
    stage: int
    """The busiest pipeline rank."""


def step_times(config: ResolvedConfig, world_size: int, gpu: Gpu, hardware: Hardware) -> tuple[StepTime, StepTime]:
    """Predict the fastest and the slowest step.

    Args:
        config: resolved for ``world_size``.
        world_size: GPUs.
        gpu: with everything that a plan needs (``Hardware.find``).
        hardware: gives the assumptions.
    """
    assert gpu.node is not None
    traffic = stage_traffic(config, world_size, on_gpu=True, node=gpu.node)
    return (
        _Clock(config, world_size, gpu, hardware, "high").step(traffic),
        _Clock(config, world_size, gpu, hardware, "low").step(traffic),
    )


class _Clock:
    """Seconds, at one end of the assumptions."""

    def __init__(self, config: ResolvedConfig, world_size: int, gpu: Gpu, hardware: Hardware, end: End) -> None:
        self.config, self.model, self.gpu = config, config.model, gpu
        self.packs = micro_batches(config, world_size)
        self.share: Mapping[str, float] = {
            name: getattr(assumed, end) for name, assumed in hardware.assumptions.items()
        }
        self.mixers, self.ffns = layer_mixers(self.model), layer_ffns(self.model)

    def step(self, traffic: list[list[Traffic]]) -> StepTime:
        """Of all stages."""
        stages = plan_stages(self.model, self.config.parallel)
        computing = [[self.computing(chunk) for chunk in chunks] for chunks in stages.by_rank]
        exchanging = [self.exchanging(each) for each in traffic]
        weights = [
            [part + exchange / len(parts) for part in parts]
            for parts, exchange in zip(computing, exchanging, strict=True)
        ]
        totals = [sum(parts) for parts in weights]
        busiest = max(range(len(totals)), key=totals.__getitem__)
        working = self.packs * totals[busiest]
        share = bubble(stages, weights, self.packs)
        waiting = working * share / (1 - share)
        reducing = max(self.reducing(each) for each in traffic)
        return StepTime(
            seconds=working + waiting + reducing,
            computing=self.packs * sum(computing[busiest]),
            exchanging=self.packs * exchanging[busiest],
            waiting=waiting,
            reducing=reducing,
            stage=busiest,
        )

    def computing(self, chunk: StageLayers) -> float:
        """Forward and backward of one micro-batch in one model chunk, and what of it is done again."""
        parallel, train = self.config.parallel, self.config.train
        peak, ranks = self.gpu.bf16_tflops * 1e12, parallel.tensor_model_parallel_size * parallel.context_parallel_size
        tokens = self.config.padded_pack_tokens / ranks
        pairs = (self.config.padded_pack_tokens + 1) / 2
        seconds = 0.0
        modules = train.recompute_modules if train.recompute_granularity == "selective" else []
        for index in chunk.layers:
            mixer, ffn = MIXERS[self.mixers[index]], FFNS[self.ffns[index]]
            matrices, core = _core_flops(self.model, mixer, pairs)
            experts = ffn.flops_per_token(self.model) / self.share["expert_balance"]
            times = {"": 3.0, "core_attn": 3.0, "moe": 3.0}
            for name in times:
                times[name] += train.recompute_granularity == "full" or name in modules
            seconds += (
                tokens
                / peak
                * (
                    times[""] * matrices / self.share["matrices"]
                    + times["core_attn"] * core / self.share["attention"]
                    + times["moe"] * experts / self.share["matrices"]
                )
            )
        if chunk.has_head:
            seconds += self.head(tokens)
        return seconds / self.share["other"]

    def head(self, tokens: float) -> float:
        """Forward and backward of the head; logits that don't all fit are made twice."""
        flops = 2 * tokens * self.model.hidden_size * self.model.vocab_size
        if self.model.lm_head_precision == "bf16":
            return 4 * flops / (self.gpu.bf16_tflops * 1e12 * self.share["matrices"])
        assert self.gpu.fp32_tflops is not None
        return 4 * flops / (self.gpu.fp32_tflops * 1e12 * self.share["fp32_head"])

    def travelling(self, traffic: Traffic) -> float:
        """Inside a node and between nodes at once, each way."""
        assert self.gpu.nvlink_gb_s is not None and self.gpu.network_gb_s is not None
        return max(
            traffic.nvlink / (self.gpu.nvlink_gb_s / 2 * 1e9 * self.share["nvlink"]),
            traffic.network / (self.gpu.network_gb_s * 1e9 * self.share["network"]),
        )

    def exchanging(self, traffic: list[Traffic]) -> float:
        """Messages of one micro-batch that nothing hides."""
        groups = self.config.parallel.moe_token_groups
        hidden = {"CP": self.share["overlap"]} | dict.fromkeys(("EP", "ETP"), self.share["overlap"] * (1 - 1 / groups))
        return sum(
            self.travelling(each) * (1 - hidden.get(each.group, 0.0)) / self.packs
            for each in traffic
            if each.group not in PER_STEP
        )

    def reducing(self, traffic: list[Traffic]) -> float:
        """Messages of a step that nothing hides."""
        parallel, overlap = self.config.parallel, self.share["overlap"]
        hidden = {
            "reduce-scatter": overlap * parallel.overlap_grad_reduce,
            "all-gather": overlap * parallel.overlap_param_gather,
        }
        return sum(
            self.travelling(each) * (1 - hidden.get(each.collective, 0.0)) for each in traffic if each.group in PER_STEP
        )


def _core_flops(model: ModelConfig, mixer: MixerShape, pairs: float) -> tuple[float, float]:
    """Forward FLOPs of a token in a mixer's matrices, and where tokens meet."""
    matrices = sum(2 * parameter.total for parameter in mixer.parameters(model) if len(parameter.shape) == 2)
    return matrices, mixer.flops_per_token(model) - matrices + mixer.flops_per_pair(model) * pairs
