"""Experts over ranks against one process: token groups, an expert capacity, recomputation, on every kind of mesh.

With a capacity the one process drops, by a plain loop, what the mesh's ranks would drop. Runs are not the whole
product of meshes, groups, drops and recomputation, but a choice in which every two values of two of them meet, and
every three of groups, drops and recomputation.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch

from megatron_m1.config import Config
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.expert_load import EXPERT_LOAD
from megatron_m1.training.step import AUX_LOSS, GRAD_NORM, LOSS
from tests.model.meshes import COPIES, assemble, packs, run_config
from tests.model.partitions import Outcome, Partition, alone, on_mesh, outputs_in_order

CP, TP, PP, VPP, EP, ETP, G = (
    "context_parallel_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "moe_token_groups",
)
MESHES: dict[str, tuple[int, Partition, dict[str, int]]] = {
    "ep2": (2, Partition(data=2), {EP: 2}),
    "ep4": (4, Partition(data=2, context=2), {EP: 4, CP: 2}),
    "ep2-etp2": (4, Partition(data=2, tensor=2), {EP: 2, ETP: 2, TP: 2}),
    "ep2-tp2-etp1": (2, Partition(tensor=2), {EP: 2, TP: 2, ETP: 1}),
    "ep2-cp2": (2, Partition(context=2), {EP: 2, CP: 2}),
    "ep2-pp2-interleaved": (4, Partition(data=2), {EP: 2, PP: 2, VPP: 2}),
    "ep4-padded": (4, Partition(context=4), {EP: 4, CP: 4}),  # 4 ranks don't divide 50 tokens
}
GROUPS = (1, 2, 4)
DROPS = (None, 1.0)
"""Capacity factors; None drops nothing."""
RECOMPUTE: dict[str, dict[str, Any]] = {
    "kept": {},
    "full": {"recompute_granularity": "full"},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}
Run = tuple[str, int, float | None, str]


def choose() -> list[Run]:
    """A run of every mesh and number of groups; what they drop and recompute is dealt so that all pairs meet."""
    drops = ("101", "110", "011", "011", "001", "100", "110")
    runs = []
    for (row, mesh), (column, groups) in product(enumerate(MESHES), enumerate(GROUPS)):
        runs.append((mesh, groups, DROPS[int(drops[row][column])], list(RECOMPUTE)[(row + column) % 3]))
    return runs


RUNS = choose()


def test_every_pair_of_values_meets() -> None:
    values = (tuple(MESHES), GROUPS, DROPS, tuple(RECOMPUTE))
    for chosen in [*combinations(range(4), 2), (1, 2, 3)]:
        met = {tuple(run[which] for which in chosen) for run in RUNS}
        assert met == set(product(*(values[which] for which in chosen)))


def config_of(parallel: dict[str, int], factor: float | None, recompute: str = "kept") -> Config:
    """Four layers, two of a kind."""
    return run_config(
        parallel,
        RECOMPUTE[recompute],
        num_layers=4,
        mixers=["lightning", "softmax"],
        moe_expert_capacity_factor=factor,
    )


@pytest.fixture(scope="module")
def truths() -> dict[Partition | None, Outcome]:
    """Of one process, by what it emulates: made once."""
    return {}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_meshes_compute_what_one_process_computes(
    run: Run, workers: WorkerPool, truths: dict[Partition | None, Outcome]
) -> None:
    mesh, groups, factor, recompute = run
    world_size, partition, parallel = MESHES[mesh]
    emulated = None if factor is None else partition
    if emulated not in truths:
        (truths[emulated],) = workers.run(alone, config_of({}, factor), packs(), emulated, world_size=1)
    config = config_of(parallel | {G: groups}, factor, recompute)
    by_rank = workers.run(on_mesh, config, packs(), world_size=world_size)
    compare(by_rank, truths[emulated], partition, config)


def compare(by_rank: list[Outcome], truth: Outcome, partition: Partition, config: Config) -> None:
    """Every token's loss, what a step reports, and every gradient."""
    outputs = outputs_in_order(by_rank, partition, packs(), config)
    wanted_outputs = torch.cat(truth.outputs)
    assert (outputs - wanted_outputs).norm() <= COPIES * wanted_outputs.norm()
    expected = assemble([truth.parts])
    gradients = assemble([rank.parts for rank in by_rank])
    assert gradients.keys() == expected.keys()
    for key, wanted in expected.items():
        assert (gradients[key] - wanted).norm() <= COPIES * wanted.norm(), key
    for rank in by_rank:
        for figure in (LOSS, AUX_LOSS, GRAD_NORM):
            assert rank.result.figures[figure] == pytest.approx(truth.result.figures[figure], rel=COPIES), figure.name
        assert rank.result.routing[EXPERT_LOAD] == pytest.approx(truth.result.routing[EXPERT_LOAD], rel=COPIES)
