"""Who is in which process group, against megatron-core's own groups."""

from __future__ import annotations

from typing import Any

import pytest
from torch import distributed as dist

from megatron_m1 import cli
from megatron_m1.config import Config
from megatron_m1.config.resolve import resolve
from megatron_m1.plan.ranks import first_group, groups_over, process_groups, spelled
from megatron_m1.runtime import mesh
from megatron_m1.runtime.pool import WorkerPool
from tests.model.meshes import run_config

FIELDS = {"TP": "tp", "CP": "cp", "DP": "dp", "PP": "pp", "ETP": "expt_tp", "EP": "ep", "EDP": "expt_dp"}
TP, CP, PP, EP, ETP = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def real_groups(rank: int, world_size: int, config: Config) -> dict[str, tuple[int, ...]]:
    """The ranks of every group that this rank is in."""
    grid = mesh.initialise(resolve(config, world_size, has_gpu=False).parallel, seed=0)
    return {name: tuple(dist.get_process_group_ranks(getattr(grid.groups, field))) for name, field in FIELDS.items()}


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(8, {TP: 2, CP: 2, PP: 2, EP: 2}), (8, {TP: 2, PP: 2, EP: 2, ETP: 2}), (6, {CP: 3, EP: 2}), (4, {EP: 4})],
)
def test_groups_are_those_that_train(world_size: int, parallel: dict[str, Any], workers: WorkerPool) -> None:
    config = run_config(parallel)
    by_rank = workers.run(real_groups, config, world_size=world_size)
    for group in process_groups(resolve(config, world_size, has_gpu=False).parallel, world_size):
        assert sorted(group.members) == sorted({groups[group.name] for groups in by_rank}), group.name


@pytest.mark.parametrize("names", ["TP", "CP", "DP x CP", "TP x CP", "EP x ETP", "EDP", "PP", "ETP"])
def test_the_first_group_is_the_first_of_all(names: str) -> None:
    parallel = resolve(run_config({TP: 2, CP: 2, PP: 2, EP: 2, ETP: 2}), 16, has_gpu=False).parallel
    assert tuple(sorted(first_group(names, parallel, 16))) == groups_over(names, parallel, 16)[0]


def test_a_table_of_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--parallel.expert_model_parallel_size", "2", "--parallel.pipeline_model_parallel_size", "2"]
    assert cli.run(["inspect", "--preset", "tiny", "--mesh", "--world-size", "8", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "world = PP x DP x CP x TP = 2 x 4 x 1 x 1 = PP x EDP x EP x ETP = 2 x 2 x 2 x 1 = 8"
    (experts,) = (line for line in lines if line.startswith("EP "))
    assert experts.split() == ["EP", "2", "4", "0-1", "6-7", "the", "experts"]
    assert lines[-1].split() == ["7", "0", "0", "3", "1", "0", "1", "1"]


def test_many_ranks_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--parallel.expert_model_parallel_size", "32", "--parallel.pipeline_model_parallel_size", "8"]
    assert cli.run(["inspect", "--preset", "m1-456b", "--mesh", "--world-size", "2048", *flags]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 10
    assert "0, 256, ..., 1792" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "tiny", "--mesh"], "--mesh and --world-size N go together"),
        (["--preset", "tiny", "--world-size", "2"], "--mesh and --world-size N go together"),
        (["somewhere", "--mesh", "--world-size", "2"], "--mesh and --world-size N go together"),
        (
            ["--preset", "tiny", "--mesh", "--world-size", "3", "--parallel.tensor_model_parallel_size", "2"],
            "does not divide the world",
        ),
    ],
)
def test_wrong_meshes(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        cli.run(["inspect", *words])


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        (16, ["parallel.expert_model_parallel_size=16"], "model.num_moe_experts = 8"),
        (3, ["parallel.tensor_model_parallel_size=3"], "model.num_attention_heads = 4"),
        (2, ["parallel.moe_token_groups=0"], "parallel.moe_token_groups = 0"),
        (2, ["parallel.overlap_param_gather=true"], "parallel.overlap_param_gather needs"),
        (2, ["parallel.context_parallel_size=2", "data.seq_length=3"], "data.seq_length = 3"),
        (2, ["parallel.pipeline_model_parallel_size=3"], "model.num_layers = 8"),
        (1, ["parallel.expert_tensor_parallel_size=2"], "processes or lower parallel.expert_tensor_parallel_size\n"),
    ],
)
def test_a_mesh_that_can_not_train_is_not_shown(
    size: int, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", "--preset", "tiny", "--mesh", "--world-size", str(size), *(f"--{each}" for each in settings)]
    assert cli.exit_status(lambda: cli.run(words)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert message in err


def test_ranks_in_few_words() -> None:
    assert [spelled(r) for r in ((3,), (0, 1, 2), (0, 2), (0, 4, 8, 12, 16), (0, 1, 4))] == [
        "3",
        "0-2",
        "0, 2",
        "0, 4, ..., 16",
        "0, 1, 4",
    ]
