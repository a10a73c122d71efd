"""Every mesh against one process: loss, aux loss, expert load, gradient norm, every gradient, then 20 optimizer steps.

The weights come from ``initialise_weights``, so that agreement also proves that no mesh changes them. Tolerance: fp32
sums in another order differ by some 1e-7 of their size at each of the 8 layers, so gradients are held to 2e-6 relative
to their norm. Twenty steps of AdamW amplify that: its first steps divide small gradients by their own size, hence 2e-4.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.expert_load import EXPERT_LOAD
from megatron_m1.training.step import AUX_LOSS, GRAD_NORM, LOSS
from tests.model.meshes import assemble, gradients_and_trace, router_gradient, run_config

GRADIENT_TOLERANCE = 2e-6
TRACE_TOLERANCE = 2e-4
STEPS = 20
FEWER_STEPS = 4
"""Of meshes that only put together, or do with more ranks, what others run for 20 steps."""

CP = "context_parallel_size"
TP = "tensor_model_parallel_size"
PP = "pipeline_model_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
EP = "expert_model_parallel_size"
ETP = "expert_tensor_parallel_size"
G = "moe_token_groups"
LAYOUT = "pipeline_model_parallel_layout"

MESHES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {TP: 2}, {}),
    "tp4-two-groups": (4, {TP: 4}, {}),
    "pp2": (2, {PP: 2}, {}),
    "pp2-interleaved": (2, {PP: 2, VPP: 2}, {}),
    "pp2-uneven": (2, {PP: 2, LAYOUT: "Et*5|t*3L"}, {}),
    "dp2": (2, {}, {}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
    "ep2": (2, {EP: 2}, {}),
    "ep2-allgather": (2, {EP: 2}, {"moe_token_dispatcher_type": "allgather"}),
    "etp2": (2, {TP: 2, ETP: 2}, {}),
    "tp2-pp2": (4, {TP: 2, PP: 2}, {}),
    "tp2-ep2": (4, {TP: 2, EP: 2}, {}),
    "ep2-etp2": (4, {TP: 2, EP: 2, ETP: 2}, {}),
    "tp2-pp2-dp2": (8, {TP: 2, PP: 2}, {}),
    "cp2": (2, {CP: 2}, {}),
    "cp3": (3, {CP: 3}, {}),
    "cp4": (4, {CP: 4}, {}),
    "cp5": (5, {CP: 5}, {}),
    "cp2-dp2": (4, {CP: 2}, {}),
    "cp2-tp2": (4, {CP: 2, TP: 2}, {}),
    "cp2-pp2": (4, {CP: 2, PP: 2}, {}),
    "cp2-pp2-interleaved": (4, {CP: 2, PP: 2, VPP: 2}, {}),
    "cp2-ep2": (2, {CP: 2, EP: 2}, {}),
    "cp2-tp2-ep2-etp2": (4, {CP: 2, TP: 2, EP: 2, ETP: 2}, {}),
    "cp2-tp2-pp2": (8, {CP: 2, TP: 2, PP: 2}, {}),
    "cp2-recompute-full": (2, {CP: 2}, {"recompute_granularity": "full"}),
    "cp3-recompute-selective": (
        3,
        {CP: 3},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
    ),
    "groups": (1, {G: 3}, {}),
    "ep2-groups": (2, {EP: 2, G: 2}, {}),
    "cp2-ep4-groups": (4, {CP: 2, EP: 4, G: 4}, {}),
    "tp2-ep2-groups": (4, {TP: 2, EP: 2, G: 2}, {}),
    "ep2-etp2-groups": (4, {TP: 2, EP: 2, ETP: 2, G: 4}, {}),
    "cp2-ep2-groups": (2, {CP: 2, EP: 2, G: 2}, {}),
    "cp2-ep2-pp2-interleaved-groups": (4, {CP: 2, EP: 2, PP: 2, VPP: 2, G: 2}, {}),
    "ep2-groups-overlap": (2, {EP: 2, G: 2, "overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
    "ep2-groups-recompute-full": (2, {EP: 2, G: 2}, {"recompute_granularity": "full"}),
    "ep2-etp2-groups-recompute-moe": (
        4,
        {TP: 2, EP: 2, ETP: 2, G: 2},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ),
    "recompute-full": (2, {PP: 2}, {"recompute_granularity": "full"}),
    "recompute-selective": (
        2,
        {TP: 2},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
    ),
}

ALL_STEPS = {"cp2", "cp5", "cp2-tp2-pp2", "cp2-recompute-full"}
"""Of the meshes with context parallelism, those that take 20 steps."""


@pytest.fixture(scope="module")
def one_process(workers: WorkerPool) -> dict[str, Any]:
    """The truth of all meshes."""
    (result,) = workers.run(gradients_and_trace, run_config({}), STEPS, world_size=1)
    return result


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_computes_what_one_process_computes(name: str, workers: WorkerPool, one_process: dict[str, Any]) -> None:
    world_size, parallel, rest = MESHES[name]
    model = {key: value for key, value in rest.items() if key.startswith("moe_")}
    train_values = {key: value for key, value in rest.items() if not key.startswith("moe_")}
    config = run_config(parallel, train_values, **model)
    fewer = name == "tp4-two-groups" or "groups" in name or (CP in parallel and name not in ALL_STEPS)
    steps = FEWER_STEPS if fewer else STEPS
    results = workers.run(gradients_and_trace, config, steps, world_size=world_size)
    expected = assemble([one_process["parts"]])
    gradients = assemble([result["parts"] for result in results])
    assert gradients.keys() == expected.keys()
    errors = {key: ((gradients[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] < GRADIENT_TOLERANCE, f"{worst}: {errors[worst]}"
    for result in results:
        _assert_same(result["first"], one_process["first"], GRADIENT_TOLERANCE)
        # Later steps' weights differ by more than some router's choice between two experts may bear.
        load = one_process["first"].routing[EXPERT_LOAD]
        assert result["first"].routing[EXPERT_LOAD] == pytest.approx(load, rel=GRADIENT_TOLERANCE)
        for step, truth in zip(result["trace"], one_process["trace"][:steps], strict=True):
            _assert_same(step, truth, TRACE_TOLERANCE)


def _assert_same(step: Any, truth: Any, tolerance: float) -> None:
    assert step.updated and truth.updated
    assert step.weight == truth.weight
    for figure in (LOSS, AUX_LOSS, GRAD_NORM):
        assert step.figures[figure] == pytest.approx(truth.figures[figure], rel=tolerance), figure.name


def test_aux_loss_gradient_does_not_depend_on_masked_targets(workers: WorkerPool) -> None:
    """It counts packs, not predicted tokens: masking 30 targets of every pack must not change the aux gradient."""

    def aux_gradient(masked: int) -> torch.Tensor:
        with_aux, without = (
            workers.run(router_gradient, run_config({}, moe_aux_loss_coeff=coefficient), masked, world_size=1)[0]
            for coefficient in (1.0, 0.0)
        )
        difference: torch.Tensor = with_aux - without
        return difference

    few, many = aux_gradient(1), aux_gradient(30)
    assert few.norm() > 0
    # The small difference of two larger gradients, hence an absolute tolerance on its scale.
    torch.testing.assert_close(many, few, rtol=0.0, atol=1e-4 * few.abs().max().item())
