"""Presets on the meta device, initial weights, and the stand-in's list of patched symbols."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from megatron_m1.config import Config
from megatron_m1.config.presets import PRESETS, m1_456b, preset
from megatron_m1.config.resolve import resolve
from megatron_m1.layers.kind import Matrix
from megatron_m1.model.initialise import fill
from megatron_m1.plan.parameters import model_counts
from megatron_m1.runtime import cpu, mesh
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.shapes.residual import inner_gain, output_gain

M1_PARAMETERS = 456_089_655_296
TRAIN_STATE_BYTES = 18
"""Per parameter: bf16 weight, fp32 gradient, master weight and two moments."""


def meta_parameters(rank: int, world_size: int, name: str) -> tuple[int, int, list[str]]:
    """Build a preset without memory: parameters, those in fp32, kinds of its layers."""
    from megatron_m1.layers.engine import engine_config
    from megatron_m1.model.build import build_chunk

    config = Config()
    config.model = preset(name)
    config = resolve(config, 1, has_gpu=False)
    mesh.initialise(config.parallel, seed=1)
    with torch.device("meta"):
        model = build_chunk(
            engine_config(config, dtype=torch.bfloat16, on_default_device=True),
            vocab_size=config.model.vocab_size,
            max_sequence_length=8192,
        )
    parameters = list(model.parameters())
    assert all(parameter.is_meta for parameter in parameters)
    kinds = [type(layer.self_attention).__name__ for layer in model.decoder.layers]
    fp32 = sum(p.numel() for p in parameters if p.dtype == torch.float32)
    return sum(p.numel() for p in parameters), fp32, kinds


@pytest.mark.parametrize("name", PRESETS)
def test_the_built_model_has_the_counted_parameters(name: str, workers: WorkerPool) -> None:
    ((total, fp32, kinds),) = workers.run(meta_parameters, name, world_size=1)
    model = preset(name)
    assert total == model_counts(model).total
    routers = model.num_layers * model.num_moe_experts * model.hidden_size
    assert fp32 == routers + model.vocab_size * model.hidden_size
    assert kinds == (["LightningAttention"] * 7 + ["SelfAttention"]) * (model.num_layers // 8)
    if name == "m1-456b":
        assert total == M1_PARAMETERS
    if name == "m1-mid":
        assert total <= 3.5e9 and total * TRAIN_STATE_BYTES < 64e9 and model.num_moe_experts == 8


def test_every_patched_symbol_is_still_in_megatron_core() -> None:
    for module, attribute in cpu.PATCHED_LIBRARY_SYMBOLS:
        assert hasattr(importlib.import_module(module), attribute), f"{module}.{attribute}"
    optimizer = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    assert all(hasattr(optimizer, name) for name in ("Adam", "USING_PYTORCH_OPTIMIZER"))
    assert all(hasattr(distributed, name) for name in ("Adam", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"))


def norm_of_large_gradients(rank: int, world_size: int) -> tuple[float, float]:
    """Gradient norm by megatron-core and in fp64, of tensors of 2,001, 4 million and 7 numbers."""
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    mesh.initialise(resolve(Config(), 1, has_gpu=False).parallel, seed=1)
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(size, generator=generator) for size in (2_001, 2_000, 7)]
    gradients[1] = gradients[1].repeat(2_000).view(2_000, 2_000)
    norm = get_grad_norm_fp32(gradients, grad_stats_parallel_group=torch.distributed.group.WORLD)
    return float(norm), math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def test_the_gradient_norm_of_large_tensors_is_exact(workers: WorkerPool) -> None:
    ((norm, expected),) = workers.run(norm_of_large_gradients, world_size=1)
    assert norm == pytest.approx(expected, rel=1e-6)


def test_a_slice_of_a_matrix_is_what_the_whole_matrix_holds_there() -> None:
    whole = torch.empty(700, 30)
    fill(whole, Matrix("layers.3.attention.q", 700, 30), seed=5)
    part = torch.empty(301, 11)
    fill(part, Matrix("layers.3.attention.q", 700, 30, first_row=250, first_column=7), seed=5)
    assert torch.equal(part, whole[250:551, 7:18])
    other = torch.empty(700, 30)
    fill(other, Matrix("layers.4.attention.q", 700, 30), seed=5)
    assert not torch.equal(other, whole)


def test_initial_scale_is_xavier_with_deepnorms_gain() -> None:
    weight = torch.empty(2048, 512)
    fill(weight, Matrix("w", 2048, 512, gain=0.5), seed=1)
    # Standard error of a standard deviation from n samples: std / sqrt(2 n); five of them.
    expected = 0.5 * (2.0 / (2048 + 512)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=5 / (2 * weight.numel()) ** 0.5)
    assert abs(weight.mean().item()) < 5 * expected / weight.numel() ** 0.5
    assert inner_gain(m1_456b()) == output_gain(m1_456b()) == pytest.approx(0.19882, abs=5e-6)
