"""The step-time model: its limits by hand, and what must make a step longer or shorter."""

from __future__ import annotations

import pytest

from megatron_m1.config import Config
from megatron_m1.config.io import parse_config
from megatron_m1.config.pipeline import plan_stages
from megatron_m1.config.resolve import resolve
from megatron_m1.plan.flops import flops_by_part
from megatron_m1.plan.hardware import Assumed, Hardware, own_hardware
from megatron_m1.plan.schedule import bubble
from megatron_m1.plan.step_time import StepTime, step_times

PERFECT = Hardware(own_hardware().gpus, {name: Assumed(1, 1, "perfect") for name in own_hardware().assumptions})
GPU = own_hardware().find("h800")


def configuration(*flags: str) -> Config:
    common = ["--model.lm_head_precision=bf16", "--train.global_batch_size=64"]
    return parse_config([], [*common, *flags], "m1-456b")


def times(config: Config, world_size: int, hardware: Hardware = PERFECT) -> tuple[StepTime, StepTime]:
    return step_times(resolve(config, world_size, has_gpu=True), world_size, GPU, hardware)


def test_a_perfect_gpu_alone_computes_at_its_peak() -> None:
    config = configuration()
    fast, slow = times(config, 1)
    assert fast == slow and (fast.exchanging, fast.waiting, fast.reducing) == (0, 0, 0)
    # Logits that don't fit are made twice, which no FLOPs are counted for.
    twice = 2 * config.model.hidden_size * config.model.vocab_size
    flops = sum(flops_by_part(config.model, 8192).values()) + twice
    assert fast.seconds == pytest.approx(flops * config.tokens_per_step / 989e12, rel=1e-6)


def test_recomputation_is_a_third_more() -> None:
    plain, _ = times(configuration(), 1)
    full, _ = times(configuration("--train.recompute_granularity=full"), 1)
    core, _ = times(configuration("--train.recompute_granularity=selective"), 1)
    assert plain.seconds < core.seconds < full.seconds < plain.seconds * 4 / 3


def test_tensor_parallel_messages_cross_nvlink_each_way() -> None:
    split, _ = times(configuration("--parallel.tensor_model_parallel_size=8"), 8)
    model, tokens = configuration().model, 8192
    # Of each layer three gathers and two scatters of [8192, 6144] bf16; of the head two and one, of the embedding one
    # of each; and the norms' sums.
    whole = (80 * 5 + 5) * tokens * model.hidden_size * 2 * 7 / 8
    sums = (70 * 2 + 3) * tokens * 4 * 2 * 7 / 8
    expected = 64 * (whole + sums) / 200e9
    assert split.exchanging == pytest.approx(expected, rel=1e-3)


def test_the_bubble_of_equal_stages() -> None:
    config = configuration("--parallel.pipeline_model_parallel_size=4").model
    parallel = configuration("--parallel.pipeline_model_parallel_size=4").parallel
    assert bubble(plan_stages(config, parallel), [[1.0]] * 4, 12) == pytest.approx(3 / 15)
    parallel.virtual_pipeline_model_parallel_size = 5
    # Each chunk is a fifth of a stage, and so is what ranks wait for.
    assert bubble(plan_stages(config, parallel), [[0.2] * 5] * 4, 12) == pytest.approx(0.6 / 12.6)
    assert bubble(plan_stages(config, parallel), [[0.0] * 5] * 4, 12) == 0


def test_the_range_is_that_of_the_assumptions() -> None:
    config = configuration("--parallel.tensor_model_parallel_size=8", "--parallel.expert_model_parallel_size=8")
    fast, slow = times(config, 64, own_hardware())
    perfect, _ = times(config, 64)
    assert perfect.seconds < fast.seconds < slow.seconds


def test_what_overlap_may_hide() -> None:
    plain = configuration("--parallel.expert_model_parallel_size=8")
    overlapping = configuration(
        "--parallel.expert_model_parallel_size=8",
        "--parallel.overlap_grad_reduce=true",
        "--parallel.overlap_param_gather=true",
        "--parallel.moe_token_groups=4",
    )
    (fast, slow), (before, _) = times(overlapping, 64, own_hardware()), times(plain, 64, own_hardware())
    assert fast.reducing == 0 < slow.reducing
    assert fast.exchanging == pytest.approx(before.exchanging / 4, rel=1e-3)
