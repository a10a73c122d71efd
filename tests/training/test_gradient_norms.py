"""Gradient norms by kind and depth: every number of the gradient counts once, on every mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.config import Config
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.gradient_norms import gradient_norms
from megatron_m1.training.step import GRAD_NORM, train_step
from tests.model.meshes import PACKS, local_parts, my_share, packs, run_config, start, step_with_gradients
from tests.model.test_mesh_parity import GRADIENT_TOLERANCE

DOCUMENTS = PACKS[:2]
LAYERS = 10
"""Of both mixers in turn. Eight groups of them: two have two layers."""
EIGHTH_OF = [1, 1, 2, 2, 3, 4, 5, 6, 7, 8]
TP, PP, EP, CP = (f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "expert_model", "context"))
MESHES: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {TP: 2},
    "pp2": {PP: 2},
    "ep2": {EP: 2},
    "tp2-etp2": {TP: 2, "expert_tensor_parallel_size": 2},
    "tp2-cp2": {TP: 2, CP: 2},
}


def config_on(parallel: Mapping[str, Any], precision: str = "fp32") -> Config:
    return run_config(
        dict(parallel),
        {"precision": precision},
        documents=DOCUMENTS,
        num_layers=LAYERS,
        mixers=["lightning", "softmax"],
    )


def of_a_step(rank: int, world_size: int, config: Config) -> tuple[dict[str, float], float]:
    """Norms by name, and the norm that the step itself has found; both before clipping."""
    trained = start(config, world_size)
    found: dict[str, float] = {}

    def look(norm: float) -> bool:
        found.update({figure.name: value for figure, value in gradient_norms(trained).items()})
        return True

    result = train_step(trained, my_share(trained, packs(documents=DOCUMENTS)), 1e-3, look)
    return found, result.figures[GRAD_NORM]


def all_gradients(rank: int, world_size: int, config: Config) -> dict[str, Tensor]:
    """Every gradient of the same batch by name, in one process."""
    config.optimizer.clip_grad = 0.0  # it would scale what is read
    trained = start(config, world_size)
    step_with_gradients(trained, packs(documents=DOCUMENTS))
    return {name: part.value for name, part in local_parts(trained, "main_grad").items()}


def kind_of(name: str, layer: int | None) -> str:
    """What a parameter of this model is, by its name."""
    if layer is None:
        return "embedding" if "embedding" in name else "head" if "output_layer" in name else "norms"
    if "layernorm" in name:
        return "norms"
    if ".mlp." in name:
        return "router" if ".router." in name else "experts"
    return ("lightning", "softmax")[layer % 2]


def norm_of(gradients: Iterable[Tensor]) -> float:
    return float(torch.cat([gradient.double().flatten() for gradient in gradients]).norm())


@pytest.fixture(scope="module")
def truth(workers: WorkerPool) -> dict[str, float]:
    """The norms by hand."""
    (gradients,) = workers.run(all_gradients, config_on({}), world_size=1)
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        found = re.search(r"layers\.(\d+)\.", name)
        layer = int(found[1]) if found else None
        kind = kind_of(name, layer)
        names = [kind]
        if layer is not None:
            eighth = f"eighth_{EIGHTH_OF[layer]}"
            names += [eighth, *([f"{kind}_{eighth}"] if kind in ("lightning", "softmax") else [])]
        for group in names:
            groups.setdefault(f"grad_norm_{group}", []).append(gradient)
    return {"grad_norm": norm_of(gradients.values())} | {name: norm_of(part) for name, part in groups.items()}


def check_sums(norms: Mapping[str, float], whole: float) -> None:
    """Kinds, and depths with what is outside, have the squares of the whole; mixers are made of their depths."""
    kinds = ["embedding", "head", "norms", "lightning", "softmax", "router", "experts"]
    assert math.hypot(*(norms[f"grad_norm_{kind}"] for kind in kinds)) == pytest.approx(whole, rel=1e-5)
    for mixer in ("lightning", "softmax"):
        parts = [value for name, value in norms.items() if name.startswith(f"grad_norm_{mixer}_eighth_")]
        assert math.hypot(*parts) == pytest.approx(norms[f"grad_norm_{mixer}"], rel=1e-5)


def test_groups_of_one_process(workers: WorkerPool, truth: dict[str, float]) -> None:
    ((norms, whole),) = workers.run(of_a_step, config_on({}), world_size=1)
    assert whole == pytest.approx(truth["grad_norm"], rel=GRADIENT_TOLERANCE)
    assert norms.keys() == truth.keys() - {"grad_norm"}
    for name, value in norms.items():
        assert value == pytest.approx(truth[name], rel=GRADIENT_TOLERANCE), name
    check_sums(norms, whole)


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_has_the_norms_of_one_process(name: str, workers: WorkerPool, truth: dict[str, float]) -> None:
    world_size = 4 if name == "tp2-cp2" else 2
    results = workers.run(of_a_step, config_on(MESHES[name]), world_size=world_size)
    for norms, whole in results:
        assert norms == results[0][0]
        assert norms.keys() == truth.keys() - {"grad_norm"}
        for group, value in norms.items():
            assert value == pytest.approx(truth[group], rel=GRADIENT_TOLERANCE), group
        check_sums(norms, whole)


def test_bf16_parameters_have_fp32_gradients(workers: WorkerPool) -> None:
    """Their shards are copies, and stand in other lists of the optimizer."""
    for norms, whole in workers.run(of_a_step, config_on({TP: 2}, "bf16"), world_size=2):
        check_sums(norms, whole)
