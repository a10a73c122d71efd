"""Planned messages against those that go through the process groups, and the links that they cross."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import resolve
from megatron_m1.plan.traffic import over_links, stage_messages
from megatron_m1.runtime.pool import WorkerPool
from tests.model.meshes import run_config
from tests.plan.counted_traffic import counted_messages
from tests.plan.fields import CORE, CP, EP, ETP, FULL, MOE, PP, TP, VPP

TOKENS, PACKS = 60, 4

MESHES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dp2 overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, {}, {}),
    "tp2 full": (2, {TP: 2}, FULL, {}),
    "tp2 etp2": (2, {TP: 2, ETP: 2}, {}, {}),
    "tp4 of two groups": (4, {TP: 4}, CORE, {}),
    "cp2 full": (2, {CP: 2}, FULL, {}),
    "pp2 interleaved": (2, {PP: 2, VPP: 2}, {}, {}),
    "ep2 moe": (2, {EP: 2}, MOE, {}),
    "ep2 groups moe": (2, {EP: 2, "moe_token_groups": 2}, MOE, {}),
    "ep2 allgather": (2, {EP: 2}, {}, {"moe_token_dispatcher_type": "allgather"}),
    "tp2 x pp2": (4, {TP: 2, PP: 2}, {}, {}),
    "cp2 x ep2": (4, {CP: 2, EP: 2}, {}, {}),
}


@pytest.mark.parametrize("name", MESHES)
def test_the_bytes_are_those_that_go_through_the_groups(name: str, workers: WorkerPool) -> None:
    world_size, parallel, train, model = MESHES[name]
    config = run_config(parallel, train, [[0, TOKENS]] * PACKS, **model)
    planned = stage_messages(resolve(config, world_size, has_gpu=False), world_size, on_gpu=False)
    ranks = workers.run(counted_messages, config, [[0, TOKENS]] * PACKS, world_size=world_size)
    per_stage = world_size // len(planned)
    for stage, messages in enumerate(planned):
        counted = ranks[stage * per_stage : (stage + 1) * per_stage]
        assert {key for rank in counted for key in rank} == messages.keys()
        for key, size in messages.items():
            sizes = [rank.get(key, 0) for rank in counted]
            # What experts get depends on the tokens, and all ranks together get all pairs.
            found = sum(sizes) / per_stage if key == ("EP", "all-to-all") else max(sizes)
            assert found == pytest.approx(size, rel=1e-12), key


def links(group: str, collective: Any, world_size: int, **parallel: int) -> tuple[float, float]:
    config = parse_config([], [f"--parallel.{name}={size}" for name, size in parallel.items()], "m1-456b")
    config.train.global_batch_size = world_size
    resolved = resolve(config, world_size, has_gpu=False)
    traffic = over_links(group, collective, 1.0, resolved, world_size, 8)
    return traffic.nvlink, traffic.network


def test_links_of_groups_inside_a_node() -> None:
    assert links("TP", "all-gather", 16, **{TP: 8}) == (7 / 8, 0)
    assert links("TP", "all-reduce", 16, **{TP: 8}) == (2 * 7 / 8, 0)
    assert links("PP", "send", 8, **{PP: 4}) == (1, 0)


def test_links_of_groups_of_several_nodes() -> None:
    # One rank a node: all goes over the network.
    assert links("DP x CP", "reduce-scatter", 32, **{TP: 8}) == (0, 3 / 4)
    # Two nodes of eight: half of the message has to come from the other node, and eight ranks share that.
    assert links("DP x CP", "all-gather", 16) == (15 / 16, 1 / 16)
    # 8 of 32 experts' ranks are in the node.
    assert links("EP", "all-to-all", 32, **{EP: 32}) == (7 / 32, 24 / 32)
    assert links("PP", "send", 16, **{TP: 8, PP: 2}) == (0, 1)
