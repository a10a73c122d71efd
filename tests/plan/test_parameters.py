"""Parameter counts against the published ones and against a direct sum over the released checkpoint's shapes."""

from __future__ import annotations

import math

import pytest

from megatron_m1.config import ModelConfig
from megatron_m1.config.io import parse_config
from megatron_m1.config.presets import preset
from megatron_m1.config.resolve import resolve
from megatron_m1.plan.parameters import model_counts, rank_counts


def checkpoint_shapes(model: ModelConfig) -> list[tuple[int, ...]]:
    """List the shapes of all tensors of a checkpoint in the released form."""
    hidden, inner = model.hidden_size, model.num_attention_heads * model.kv_channels
    shapes: list[tuple[int, ...]] = [(model.vocab_size, hidden), (hidden,), (model.vocab_size, hidden)]
    for index in range(model.num_layers):
        if index % 8 == 7:
            key_value = model.num_query_groups * model.kv_channels
            shapes += [(inner, hidden), (key_value, hidden), (key_value, hidden), (hidden, inner)]
        else:
            shapes += [(3 * inner, hidden), (inner, hidden), (hidden, inner), (inner,)]
        shapes += [(hidden,), (hidden,), (model.num_moe_experts, hidden)]
        for _ in range(model.num_moe_experts):
            shapes += [(model.moe_ffn_hidden_size, hidden)] * 2 + [(hidden, model.moe_ffn_hidden_size)]
    return shapes


@pytest.mark.parametrize("name", ["tiny", "m1-mid", "m1-456b"])
def test_total_is_the_sum_over_the_checkpoints_shapes(name: str) -> None:
    model = preset(name)
    assert model_counts(model).total == sum(map(math.prod, checkpoint_shapes(model)))


def test_m1_has_its_published_size() -> None:
    assert model_counts(preset("m1-456b")).total == 456_089_655_296
    assert model_counts(preset("m1-456b"), active=True).without_vocabulary == pytest.approx(45.9e9, rel=1e-3)


def test_m1_mid_fits_its_limits() -> None:
    total = model_counts(preset("m1-mid")).total
    assert total <= 3.5e9
    # bf16 weights, fp32 main gradients, fp32 main weights and two moments: 18 bytes a parameter.
    assert 18 * total < 64e9


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ([], 1),
        (["--parallel.tensor_model_parallel_size=2"], 2),
        (["--parallel.expert_model_parallel_size=4", "--parallel.expert_tensor_parallel_size=2"], 8),
        (["--parallel.pipeline_model_parallel_size=2", "--parallel.pipeline_model_parallel_layout=Et|ttt|tt|ttL"], 2),
    ],
)
def test_the_ranks_hold_the_model_once_and_its_copies(flags: list[str], world_size: int) -> None:
    config = resolve(parse_config([], flags), world_size, has_gpu=False)
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor_model_parallel_size
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    whole = model_counts(model)
    held = rank_counts(model, parallel)
    assert len(held) == parallel.pipeline_model_parallel_size
    assert sum(counts["experts"] for counts in held) * experts == whole["experts"]
    assert sum(counts["norms"] + counts["router"] for counts in held) == whole["norms"] + whole["router"]
    for group in ("embedding", "head", "lightning attention", "softmax attention"):
        assert sum(counts[group] for counts in held) * tensor == whole[group] > 0
