"""The loop on several meshes: its record, validation, checkpoints, skipped steps and signals."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_m1.checkpoint.store import CheckpointError
from megatron_m1.config.io import parse_config
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.changes import changed_fields
from megatron_m1.training.run_folder import sole_writer
from tests.training import loop_runs as runs
from tests.training.loop_runs import Setting

CP, TP, PP = (
    "parallel.context_parallel_size",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
)
VPP, EP = "parallel.virtual_pipeline_model_parallel_size", "parallel.expert_model_parallel_size"
OVERLAP = [("parallel.overlap_grad_reduce", True), ("parallel.overlap_param_gather", True)]

MESH_TOLERANCE = 2e-5
"""Relative, for losses: fp32 sums in another order, amplified by a few steps of AdamW (see tests/model)."""

Train = Callable[..., tuple[Path, list[dict[str, Any]]]]


@pytest.fixture
def settings(tmp_path: Path, tiny_corpus: dict[str, Any]) -> Callable[..., Path]:
    """``settings(("train.max_steps", 4), folder="run")`` -> YAML of a run in ``tmp_path/folder``."""

    def write(*changes: Setting, folder: str = "run") -> Path:
        return runs.write_settings(tmp_path / f"{folder}.yaml", tiny_corpus, tmp_path / folder, *changes)

    return write


@pytest.fixture
def train(workers: WorkerPool, tmp_path: Path, settings: Callable[..., Path]) -> Train:
    """``train(("train.max_steps", 4), world_size=2, folder="run")`` -> run folder, summary of every rank."""

    def run(*changes: Setting, world_size: int = 2, folder: str = "run") -> tuple[Path, list[dict[str, Any]]]:
        path = settings(*changes, folder=folder)
        summaries = workers.run(runs.train, path, world_size=world_size, process_group=False)
        return tmp_path / folder, summaries

    return run


@pytest.fixture(scope="module")
def straight(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: dict[str, Any]) -> Path:
    """Folder of a run of two data-parallel ranks that nothing has interrupted."""
    root = tmp_path_factory.mktemp("straight")
    path = runs.write_settings(root / "run.yaml", tiny_corpus, root / "run")
    first, second = workers.run(runs.train, path, world_size=2, process_group=False)
    assert first == second == json.loads((root / "run" / "summary.json").read_text())
    return root / "run"


def resumable(straight: Path, folder: Path, step: int) -> None:
    """Make ``folder`` the run ``straight`` as it was when its checkpoint of ``step`` was the newest."""
    name = f"step_{step:08d}"
    shutil.copytree(straight / "checkpoints" / name, folder / "checkpoints" / name)
    (folder / "checkpoints" / "latest").write_text(f"{name}\n")
    shutil.copy(straight / "metrics.jsonl", folder)


def test_every_step_leaves_its_record(straight: Path) -> None:
    lines = runs.records(straight)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, runs.STEPS + 1))
    assert all(
        [name for name in line if "_quarter_" not in name]
        == [
            *["step", "tokens", "loss", "aux_loss", "grad_norm", "lr", "tokens_per_second", "model_tflops_per_device"],
            *["expert_load_max_over_mean", "expert_load_entropy", "dropped_share", "skipped_steps", "spikes"],
            *["memory_peak_gib", "memory_peak_rank", "memory_peak_least_gib"],
            *["data_seconds", "forward_backward_seconds", "optimizer_seconds", "save_seconds"],
        ]
        and all(math.isfinite(value) for value in line.values())
        for line in steps
    )
    assert [line["tokens"] for line in steps] == [256 * step for step in range(1, runs.STEPS + 1)]
    assert steps[0]["lr"] == pytest.approx(1.5e-3)
    assert steps[-1]["lr"] == pytest.approx(3e-3)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4, 6, 8, 10, 12]


def test_the_summary_compares_with_the_baselines(straight: Path) -> None:
    summary = json.loads((straight / "summary.json").read_text())
    assert (summary["step"], summary["tokens"], summary["interrupted"]) == (12, 3072, None)
    assert summary["validation_loss"] == runs.records(straight)[-1]["validation_loss"]
    assert summary["below_unigram"] == summary["unigram_entropy"] - summary["validation_loss"]
    assert summary["bigram_entropy"] < summary["unigram_entropy"] < math.log(504)
    last = next(record for record in reversed(runs.records(straight)) if "loss" in record)
    memory = summary["memory_peak_gib"]
    assert (max(memory), min(memory)) == (last["memory_peak_gib"], last["memory_peak_least_gib"])
    assert memory.index(max(memory)) == last["memory_peak_rank"]
    assert not list(straight.rglob("*.part")) and not list(straight.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    [
        (1, []),
        (2, OVERLAP),
        (2, [(EP, 2)]),
        (3, [(CP, 3)]),
        (2, [(PP, 2), (VPP, 2)]),
        (4, [(TP, 2), (PP, 2)]),
    ],
    ids=["alone", "dp2-overlap", "ep2", "cp3", "pp2-interleaved", "tp2-pp2"],
)
def test_loss_and_validation_do_not_depend_on_the_mesh(
    train: Train, straight: Path, world_size: int, mesh: list[Setting]
) -> None:
    folder, _ = train(("train.max_steps", 4), ("run.save_interval", 0), *mesh, world_size=world_size)
    expected = runs.records(straight)[:6]
    for ours, theirs in zip(runs.records(folder), expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {
            "step",
            "tokens",
            "loss",
            "aux_loss",
            "validation_loss",
            "lr",
            "expert_load_max_over_mean",
        }:
            assert ours[name] == pytest.approx(theirs[name], rel=MESH_TOLERANCE), name


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    [(1, []), (4, []), (2, [(CP, 2)]), (2, [(PP, 2)]), (2, [(TP, 2), (EP, 2)])],
    ids=["alone", "dp4", "cp2", "pp2", "tp2-ep2"],
)
def test_another_mesh_resumes_the_same_stream(
    train: Train, straight: Path, tmp_path: Path, world_size: int, mesh: list[Setting]
) -> None:
    resumable(straight, tmp_path / "run", 6)
    folder, _ = train(("train.max_steps", 9), *mesh, world_size=world_size)
    expected = [line for line in runs.records(straight) if "loss" in line][:9]
    lines = [line for line in runs.records(folder) if "loss" in line]
    assert lines[:6] == expected[:6]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=MESH_TOLERANCE)


def test_a_kill_in_mid_save_costs_nothing(
    workers: WorkerPool, train: Train, settings: Callable[..., Path], straight: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        workers.run(runs.train_until_killed, settings(), 6, world_size=2, process_group=False)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"latest", "step_00000003", "step_00000006.tmp"}
    folder, _ = train()
    assert runs.trace(folder) == runs.trace(straight)
    assert not list(checkpoints.glob("*.tmp"))


def test_a_full_disk_costs_checkpoints_and_nothing_else(
    workers: WorkerPool, settings: Callable[..., Path], straight: Path, tmp_path: Path
) -> None:
    workers.run(runs.train_with_a_full_disk, settings(), 6, world_size=2, process_group=False)
    assert runs.trace(tmp_path / "run") == runs.trace(straight)
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"latest", "step_00000009", "step_00000012"}


def test_too_many_failed_saves_end_the_run(workers: WorkerPool, settings: Callable[..., Path], tmp_path: Path) -> None:
    path = settings(("run.max_failed_saves", 2))
    with pytest.raises(
        CheckpointError, match=r"^checkpoints: step_00000006 can't be written: File too large .*2 saves"
    ):
        workers.run(runs.train_with_a_full_disk, path, 99, world_size=2, process_group=False)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_folder_in_which_another_process_trains(
    workers: WorkerPool, settings: Callable[..., Path], tmp_path: Path
) -> None:
    """It is found out before anything there changes, and by every rank."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step_00000003.tmp").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with sole_writer(folder, print):
        messages = workers.run(runs.train_in_a_taken_folder, settings(), world_size=2, process_group=False)
    assert messages[0] == messages[1]
    assert re.match(rf"{folder} is being trained by process {os.getpid()} on host ", messages[0])
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "run.yaml"])


def test_more_steps_keep_the_order_of_the_data(train: Train, straight: Path) -> None:
    train(("train.max_steps", 4))
    folder, _ = train()
    assert runs.trace(folder) == runs.trace(straight)


def test_what_has_changed_since_the_checkpoint_is_told() -> None:
    saved = parse_config([], [])
    now = parse_config(
        [],
        [
            *("--optimizer.lr=0.1", "--data.seq_length=64", "--train.max_steps=7", "--data.cache_folder=x"),
            *("--model.moe_router_topk=1", "--run.init_from=x"),
        ],
    )
    assert changed_fields(saved, saved) == {}
    assert changed_fields(saved, now) == {
        "run.init_from": "run.init_from None -> x, which is not read again",
        "model.moe_router_topk": "model.moe_router_topk 2 -> 1",
        "data.seq_length": "data.seq_length 512 -> 64",
        "optimizer.lr": "optimizer.lr 0.0002 -> 0.1",
    }


def test_saving_by_the_clock_in_the_background_changes_nothing(train: Train, straight: Path) -> None:
    changes = [("run.async_save", True), ("run.save_interval", 0), ("run.save_interval_minutes", 1e-6)]
    folder, _ = train(*changes, ("run.keep_checkpoints", 2))
    assert runs.trace(folder) == runs.trace(straight)
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["latest", "step_00000011", "step_00000012"]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [("train.max_steps", 4), ("data.train", ["0.5", "nowhere", "0.5", "nowhere else"]), ("data.seq_length", 32)],
        [("run.tensorboard", True), ("train.profile_step_start", 1), ("train.profile_step_end", 3), (EP, 2)],
    ],
    ids=["at its end", "beyond its end, with another blend", "with other records, on another mesh"],
)
def test_nothing_to_train_writes_nothing(
    workers: WorkerPool, settings: Callable[..., Path], straight: Path, tmp_path: Path, changes: list[Setting]
) -> None:
    """Not even a time: neither the loop's own ranks nor what checks before them."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before = runs.state_of(folder)
    path = settings(*changes)
    assert workers.run(runs.train_nothing, path, world_size=2, process_group=False) == [None, None]
    # The lock came and went in the folder itself.
    assert {name: state for name, state in runs.state_of(folder).items() if name != "."} == {
        name: state for name, state in before.items() if name != "."
    }
    before = runs.state_of(tmp_path)
    said = workers.run(runs.command, ["pretrain", "--config", str(path)], world_size=2, process_group=False)
    steps = dict(changes).get("train.max_steps", runs.STEPS)
    line = f"nothing to train: the run is at step 12, train.max_steps is {steps}; raise it to go on, or choose another"
    assert said == [(0, f"{line} run.folder\n"), (0, "")]
    assert runs.state_of(tmp_path) == before


def test_documents_may_flow_into_each_other(train: Train, straight: Path) -> None:
    changes = [("data.reset_at_documents", False), ("train.max_steps", 2)]
    alone, _ = train(*changes, world_size=1, folder="alone")
    shared, _ = train(*changes, (TP, 2))
    for ours, theirs in zip(runs.records(shared), runs.records(alone), strict=True):
        for name in ours.keys() & {"loss", "validation_loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=MESH_TOLERANCE)
    assert abs(runs.records(alone)[0]["loss"] - runs.records(straight)[0]["loss"]) > 1e-4


def test_profile_and_tensorboard(train: Train) -> None:
    changes = [("run.tensorboard", True), ("train.profile_step_start", 2), ("train.profile_step_end", 3)]
    folder, _ = train(("train.max_steps", 3), *changes)
    traces = [folder / "profile" / f"steps_2_to_2_rank_{rank}.json" for rank in range(2)]
    assert all(json.loads(path.read_text())["traceEvents"] for path in traces)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    losses = [(line["step"], pytest.approx(line["loss"])) for line in runs.records(folder) if "loss" in line]
    assert shown == losses


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_rank_saves_and_ends_all(
    workers: WorkerPool, train: Train, settings: Callable[..., Path], straight: Path, number: signal.Signals, to: int
) -> None:
    summaries = workers.run(runs.train_until_signal, settings(), number, to, world_size=2, process_group=False)
    assert summaries[0] == summaries[1]
    assert summaries[0]["interrupted"] == number.name
    assert summaries[0]["validation_loss"] is None
    step = summaries[0]["step"]
    assert 3 < step < runs.STEPS
    folder = Path(summaries[0]["run_folder"])
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{step:08d}\n"
    train()
    assert runs.trace(folder) == runs.trace(straight)


@pytest.mark.parametrize(
    ("world_size", "mesh", "value"),
    [(2, [], math.nan), (2, [(PP, 2)], math.inf), (2, [(TP, 2), (EP, 2)], -math.inf)],
    ids=["dp2", "pp2", "tp2-ep2"],
)
def test_a_gradient_that_is_not_finite_changes_nothing(
    workers: WorkerPool, settings: Callable[..., Path], world_size: int, mesh: list[Setting], value: float
) -> None:
    path = settings(*mesh)
    ranks = workers.run(runs.poison_one_gradient, path, value, world_size=world_size, process_group=False)
    for rank in ranks:
        assert rank["updated"] == (False, True)
        assert rank["unchanged"] == (True, False)
        assert rank["counts"] == ((1, 1), (1, 0))
        assert rank["next_loss"] == ranks[0]["next_loss"] and math.isfinite(rank["next_loss"])


def test_too_many_skipped_steps_end_the_run_on_every_rank(
    workers: WorkerPool, settings: Callable[..., Path], tmp_path: Path
) -> None:
    """After one update with an absurd learning rate every gradient overflows, though losses may not: norms hide it."""
    path = settings(
        ("optimizer.lr", 1e30),
        ("optimizer.lr_warmup_tokens", 0),
        ("train.max_skipped_steps", 3),
        ("run.save_interval", 1),
    )
    messages = workers.run(runs.train_until_not_finite, path, world_size=2, process_group=False)
    assert messages[0] == messages[1]
    assert re.match(r"steps 2 to 4: loss or gradient norm not finite 3 times in a row", messages[0])
    steps = [line for line in runs.records(tmp_path / "run") if "loss" in line]
    assert [line["skipped_steps"] for line in steps] == [0, 1, 2, 3]
    assert [line["grad_norm"] is None for line in steps] == [False, True, True, True]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000003" / "state.json").read_text())
    assert (state["skipped_total"], state["skipped_in_row"]) == (2, 2)
