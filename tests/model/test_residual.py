"""The residual schemes: a layer put together by hand from the model's own sub-layers, all gradients, and a mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.cli import run
from megatron_m1.config import Config
from megatron_m1.config.resolve import resolve
from megatron_m1.layers.engine import engine_config
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.model.build import build_chunk
from megatron_m1.model.initialise import initialise_weights
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.runtime import mesh
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.shapes.residual import inner_gain, output_gain, residual_alpha
from tests.model.meshes import assemble, gradients_and_trace, model_config, run_config

BOUNDS = [0, 1, 9, 23]
TOLERANCE = 2e-6
"""Of an fp32 tensor, relative to its norm: the same products, and sums of two layers in another order."""


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def by_hand(model: Any, tokens: Tensor, params: PackedBatchParams, *, normalised: bool, alpha: float) -> Tensor:
    """Logits [n, 1, vocabulary]: the layers' own attention and experts, norms and residuals as papers have them."""
    hidden = model.embedding(tokens, None)
    for layer in model.decoder.layers:
        x = rms(hidden, layer.input_layernorm.weight)
        attended, _ = layer.self_attention(x, attention_mask=None, packed_seq_params=params)
        hidden = alpha * (x if normalised else hidden) + attended
        x = rms(hidden, layer.pre_mlp_layernorm.weight)
        mixed, _ = layer.mlp(x)
        hidden = alpha * (x if normalised else hidden) + mixed
    return rms(hidden, model.decoder.final_layernorm.weight) @ model.output_layer.weight.t()


def errors(rank: int, world_size: int, residual: str, alpha: float) -> tuple[dict[str, float], float]:
    """Relative error of logits and of every gradient, and the spread of an output projection's initial weights."""
    changes: dict[str, Any] = dict(residual=residual, num_layers=2, mixers=["lightning", "softmax"])
    config = resolve(run_config({}, **changes), 1, has_gpu=False)
    mesh.initialise(config.parallel, seed=1)
    model = build_chunk(engine_config(config, dtype=torch.float32), vocab_size=104, max_sequence_length=23)
    initialise_weights(model, vocab_size=104, seed=1)
    model.eval()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 104, (1, BOUNDS[-1]), generator=generator)
    weights = torch.randn(BOUNDS[-1], 104, generator=generator)
    with torch.no_grad():
        for norm in (p for p in model.parameters() if p.dim() == 1):
            norm.add_(0.3 * torch.randn(norm.shape, generator=generator))
    params = PackedBatchParams.of(SequenceLayout.build(BOUNDS))
    # [1, n, vocabulary] and [n, 1, vocabulary] -> [n, vocabulary]
    ours = model(tokens, None, None, packed_seq_params=params)[0]
    theirs = by_hand(model, tokens, params, normalised=residual == "deepnorm", alpha=alpha)[:, 0]
    names = [name for name, _ in model.named_parameters()]
    both = [torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (ours, theirs)]
    found = {"logits": float((ours - theirs).norm() / theirs.norm())}
    found |= {name: float((a - b).norm() / b.norm()) for name, a, b in zip(names, *both, strict=True)}
    return found, float(model.decoder.layers[0].self_attention.linear_proj.weight.std())


@pytest.mark.parametrize(
    ("residual", "alpha", "gain"),
    [("deepnorm", 2**0.5, 0.5), ("prenorm", 1.0, 0.5)],  # two layers: 4^(1/4), 16^(-1/4); 1, 4^(-1/2)
)
def test_a_layer_adds_what_its_scheme_says(residual: str, alpha: float, gain: float, workers: WorkerPool) -> None:
    ((found, spread),) = workers.run(errors, residual, alpha, world_size=1)
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < TOLERANCE, f"{worst}: {found[worst]}"
    numbers = 40 * 64
    assert spread == pytest.approx(gain * (2 / (40 + 64)) ** 0.5, rel=5 / (2 * numbers) ** 0.5)


def prenorm_config(tensor: int) -> Config:
    changes: dict[str, Any] = dict(residual="prenorm", num_layers=4, mixers=["lightning", "softmax"])
    config = run_config({"tensor_model_parallel_size": tensor}, **changes)
    # The norm of its gradient is above 1, and clipping would scale each rank's share of what is compared.
    config.optimizer.clip_grad = 0.0
    return config


def test_a_mesh_trains_prenorm_as_one_process_does(workers: WorkerPool) -> None:
    alone, *ranks = (
        result
        for size in (1, 2)
        for result in workers.run(gradients_and_trace, prenorm_config(size), 0, world_size=size)
    )
    expected, gradients = assemble([alone["parts"]]), assemble([result["parts"] for result in ranks])
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert float((gradients[name] - value).norm() / value.norm()) < TOLERANCE, name
    assert ranks[0]["first"].loss == pytest.approx(alone["first"].loss, rel=TOLERANCE)


def test_the_numbers_of_both_schemes() -> None:
    deepnorm, prenorm = model_config(), model_config(residual="prenorm")  # 8 layers
    assert residual_alpha(deepnorm) == 2.0 and inner_gain(deepnorm) == output_gain(deepnorm) == pytest.approx(8**-0.5)
    assert residual_alpha(prenorm) == inner_gain(prenorm) == 1.0 and output_gain(prenorm) == 0.25
    assert residual_alpha(model_config(residual_alpha=3.0)) == 3.0


def test_another_scheme_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^model\.residual = 'postnorm' is not one of deepnorm, prenorm$"):
        run(["inspect", "--preset", "tiny", "--model.residual", "postnorm"])
