"""Runs of several stages: one trace, wherever they are stopped, on whatever mesh, and however they are cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_m1.config.io import load_config
from megatron_m1.report.charts import charts_of
from megatron_m1.report.marks import marks_of
from megatron_m1.report.runs import Run, open_runs, read_runs
from megatron_m1.report.words import Told, told
from megatron_m1.runtime.pool import WorkerPool
from tests.training import loop_runs as runs
from tests.training.staged_runs import Stage, recipe, steps_of, train_until_killed_at, write_recipe
from tests.training.test_loop import MESH_TOLERANCE, resumable

pytestmark = pytest.mark.slow

STEPS = 12
RECIPE = Path(__file__).resolve().parents[2] / "examples" / "configs" / "tiny-recipe.yaml"
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def stages(second_corpus: str, tiny_corpus: dict[str, Any]) -> list[Stage]:
    return recipe(second_corpus, tiny_corpus["train"][0])


@pytest.fixture
def write(tmp_path: Path, tiny_corpus: dict[str, Any]) -> Write:
    """``write(stages, *settings, folder="run")`` -> YAML of a run in ``tmp_path/folder``."""

    def write(stages: list[Stage], *settings: runs.Setting, folder: str = "run") -> Path:
        return write_recipe(tmp_path / f"{folder}.yaml", tiny_corpus, tmp_path / folder, stages, *settings)

    return write


@pytest.fixture(scope="module")
def straight(
    workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: dict[str, Any], stages: list[Stage]
) -> Path:
    """Folder of a run that nothing has interrupted."""
    root = tmp_path_factory.mktemp("stages")
    path = write_recipe(root / "run.yaml", tiny_corpus, root / "run", stages)
    workers.run(runs.train, path, world_size=1, process_group=False)
    return root / "run"


def test_stages_follow_each_other(straight: Path) -> None:
    steps = steps_of(straight)
    assert [line["stage"] for line in steps] == [1] * 4 + [2] * 6 + [3] * 2
    lengths = [*[4 * 64] * 4, *[2 * 128] * 4, *[4 * 128] * 4]
    assert [line["tokens"] for line in steps] == [sum(lengths[: step + 1]) for step in range(STEPS)]
    assert [line["lr"] for line in steps[:2]] == [pytest.approx(1.5e-3), pytest.approx(3e-3)]
    assert [line["lr"] for line in steps[-3:]] == [3e-3, pytest.approx(3e-3 - 0.512 * 2e-3), 1e-3]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert json.loads((straight / "summary.json").read_text())["step"] == STEPS
    # The run has its recipe, a checkpoint what it was trained with.
    assert load_config(straight / "config.yaml").model.rotary_base == 1e4
    saved = load_config(straight / "checkpoints" / "step_00000010" / "config.yaml")
    assert (saved.model.rotary_base, saved.data.seq_length, len(saved.stages)) == (5e4, 128, 3)
    state = json.loads((straight / "checkpoints" / "step_00000012" / "state.json").read_text())
    assert state["stages"] == {"short": 0, "long": 1024, "end": 3072}
    assert state["stream"]["packs"] == state["consumed_samples"] == 4 * 4 + 2 * 4 + 4 * 4


def told_of(folder: Path) -> tuple[Run, Told]:
    """The run as a report reads it."""
    (run,) = opened = open_runs([folder])
    read_runs(opened)
    return run, told(run)


def starts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def test_each_stage_leaves_a_start(straight: Path) -> None:
    starts = starts_of(straight)
    assert [(line["step"], line["stage"], line["same_processes"]) for line in starts] == [
        (0, "short", False),
        (4, "long", True),
        (10, "end", True),
    ]
    assert {(line["world_size"], line["version"]) for line in starts} == {(1, metadata.version("megatron-m1"))}
    times = [datetime.fromisoformat(line["time"]) for line in starts]
    assert times == sorted(times) and all(time.utcoffset() is not None for time in times)
    lengths = [(line["config"]["data"]["seq_length"], line["config"]["model"]["rotary_base"]) for line in starts]
    assert lengths == [(64, 1e4), (128, 5e4), (128, 5e4)]
    assert starts[-1]["config"] == yaml.safe_load((straight / "resolved.yaml").read_text())


def test_a_report_shows_stages_by_name(straight: Path, tmp_path: Path) -> None:
    run, words = told_of(straight)
    spans = ["steps 1 to 4", "steps 5 to 10", "steps 11 to 12"]
    assert words.stages == list(zip(["short", "long", "end"], spans, strict=True))
    assert words.restarts == []
    changes = {path: (before, after, when) for path, before, after, when in words.changes}
    assert changes["data.seq_length"] == ("64", "128", "stage long after step 4")
    assert changes["data.packing"] == ("chop", "best_fit", "stage end after step 10")
    marks = [(mark.step, mark.text) for mark in marks_of([run]) if mark.kind == "stage"]
    assert marks == [(1, "short"), (5, "long"), (11, "end")]
    assert "stage" not in {curve.name for chart in charts_of([run]) for curve in chart.curves}
    # Of an older version, by the recipe; without that, by number.
    shutil.copytree(straight, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "starts.jsonl"))
    assert told_of(tmp_path / "run")[1].stages == words.stages
    for name in ("config.yaml", "resolved.yaml"):
        (tmp_path / "run" / name).unlink()
    assert told_of(tmp_path / "run")[1].stages == list(zip(["stage 1", "stage 2", "stage 3"], spans, strict=True))


def test_killed_at_three_points(workers: WorkerPool, straight: Path, stages: list[Stage], write: Write) -> None:
    """In the midst of a stage, in a save, and between two stages, when the next one has not begun."""
    path = write(stages)
    folder = path.with_suffix("")
    for sign in ("3", "checkpoints/step_00000009.tmp", "checkpoints/step_00000010/metadata.json"):
        with pytest.raises(RuntimeError, match="ended with exit code -9"):
            workers.run(train_until_killed_at, path, sign, world_size=1, process_group=False)
    assert 10 <= runs.steps_recorded(folder) < STEPS
    workers.run(runs.train, path, world_size=1, process_group=False)
    assert runs.trace(folder) == runs.trace(straight)
    begun = [(line["stage"], line["same_processes"]) for line in starts_of(folder)]
    _, words = told_of(folder)
    assert len(words.restarts) + 1 == sum(not same for _, same in begun) == 4
    assert begun[-1] == ("end", False), "killed between two stages"
    assert [name for name, _ in words.stages] == ["short", "long", "end"]


@pytest.mark.parametrize(("step", "world_size"), [(4, 2), (6, 2)], ids=["at the end of a stage", "in a stage"])
def test_other_ranks_go_on_in_the_same_stream(
    workers: WorkerPool, straight: Path, stages: list[Stage], write: Write, step: int, world_size: int
) -> None:
    path = write(stages)
    resumable(straight, path.with_suffix(""), step)
    workers.run(runs.train, path, world_size=world_size, process_group=False)
    ours, theirs = steps_of(path.with_suffix("")), steps_of(straight)
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=MESH_TOLERANCE)


def test_stages_cut_in_two_leave_the_trace_of_one(
    workers: WorkerPool, straight: Path, stages: list[Stage], write: Write
) -> None:
    short, long, end = stages
    cut = [{**short, "tokens": 300}, {"name": "rest", "tokens": 700}]
    cut += [{**long, "tokens": 1111}, {"name": "more", "tokens": 889}, end]
    path = write(cut)
    workers.run(runs.train, path, world_size=1, process_group=False)
    assert runs.trace(path.with_suffix("")) == runs.trace(straight)
    assert [line["stage"] for line in steps_of(path.with_suffix(""))] == [1, 1, 2, 2, *[3] * 5, 4, 5, 5]


def test_an_older_checkpoint_begins_the_data_anew(
    workers: WorkerPool, straight: Path, stages: list[Stage], write: Write
) -> None:
    path = write(stages, ("train.max_steps", 7))
    folder = path.with_suffix("")
    resumable(straight, folder, 6)
    checkpoint = folder / "checkpoints" / "step_00000006"
    state = json.loads((checkpoint / "state.json").read_text())
    del state["stages"], state["stream"]
    (checkpoint / "state.json").write_text(json.dumps(state | {"train_samples": 48}))
    manifest = json.loads((checkpoint / "integrity.json").read_text())
    manifest["files"]["state.json"] = runs.digest(checkpoint / "state.json")
    (checkpoint / "integrity.json").write_text(json.dumps(manifest))
    words = ["pretrain", "--config", str(path)]
    ((status, said),) = workers.run(runs.command, words, world_size=1, process_group=False)
    assert status == 0
    assert "its checkpoint is of an older version, which knew no stream of data: the data are begun anew\n" in said
    assert [line["tokens"] for line in steps_of(folder)][-1] == 7 * 256


EXPERTS, CONTEXT = {"expert_model_parallel_size": 2}, {"context_parallel_size": 2, "expert_model_parallel_size": 1}
MESHES = [
    {"name": "ep2", "tokens": 500, "parallel": EXPERTS},
    {"name": "cp2", "tokens": 500, "parallel": CONTEXT, "data": {"seq_length": 128}, "train": {"global_batch_size": 2}},
    {
        "name": "ep4",
        "tokens": 500,
        "parallel": {"context_parallel_size": 1, "expert_model_parallel_size": 4},
        "train": {"global_batch_size": 4},
    },
]


def test_meshes_change_between_stages_and_the_loss_does_not(workers: WorkerPool, write: Write) -> None:
    path = write(MESHES, ("train.eval_samples", 4))
    folder = path.with_suffix("")
    first = workers.run(runs.command, ["pretrain", "--config", str(path)], world_size=2, process_group=False)
    assert [status for status, _ in first] == [0, 0]
    goes_on = f"the run is saved, and goes on with megatron-m1 pretrain --run.folder {folder} on"
    assert f"stage cp2 needs another mesh: {goes_on} 2 processes (--nproc-per-node 2 on one node)\n" in first[0][1]
    # The folder alone says everything, on another mesh.
    alone = ["pretrain", "--run.folder", str(folder)]
    second = workers.run(runs.command, alone, world_size=2, process_group=False)
    assert [status for status, _ in second] == [0, 0]
    assert "stage cp2 begins after step 2 (512 tokens): " in second[0][1]
    assert f"stage ep4 needs another mesh: {goes_on} 4 processes" in second[0][1]
    assert json.loads((folder / "summary.json").read_text())["next_stage"] == "ep4"
    with pytest.raises(ValueError, match=r"^stage ep4: the expert mesh does not divide a pipeline stage"):
        workers.run(runs.command, alone, world_size=2, process_group=False)
    third = workers.run(runs.command, alone, world_size=4, process_group=False)
    assert [status for status, _ in third] == [0] * 4
    plain = [{key: value for key, value in stage.items() if key != "parallel"} for stage in MESHES]
    one = write(plain, folder="one")
    workers.run(runs.train, one, world_size=1, process_group=False)
    ours, theirs = steps_of(folder), steps_of(one.with_suffix(""))
    assert [line["stage"] for line in ours] == [line["stage"] for line in theirs] == [1, 1, 2, 2, 3]
    begun = [(line["step"], line["stage"], line["world_size"], line["same_processes"]) for line in starts_of(folder)]
    assert begun == [(0, "ep2", 2, False), (2, "cp2", 2, False), (4, "ep4", 4, False)], "none that was refused"
    assert [mark.step for mark in marks_of([told_of(folder)[0]]) if mark.kind == "restart"] == [2, 4]
    for name in ("loss", "aux_loss", "tokens"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=MESH_TOLERANCE), name


def test_a_checkpoint_of_a_stage_that_is_gone(
    workers: WorkerPool, straight: Path, stages: list[Stage], write: Write
) -> None:
    path = write(stages)
    resumable(straight, path.with_suffix(""), 6)
    tree = yaml.safe_load(path.read_text())
    tree["stages"][1]["name"] = "other"
    path.write_text(yaml.safe_dump(tree))
    before = runs.state_of(path.with_suffix(""))
    with pytest.raises(ValueError, match=r"in stage long, which is none of the run's \(short, other, end\)"):
        workers.run(runs.command, ["pretrain", "--config", str(path)], world_size=1, process_group=False)
    assert runs.state_of(path.with_suffix("")) == before


def test_a_damaged_checkpoint_of_a_stage_falls_back_to_the_one_before(
    workers: WorkerPool, straight: Path, stages: list[Stage], write: Write
) -> None:
    """Which is in another stage than the newest said."""
    path = write(stages)
    folder, name = path.with_suffix(""), "step_00000006"
    resumable(straight, folder, 3)
    shutil.copytree(straight / "checkpoints" / name, folder / "checkpoints" / name)
    data = next((folder / "checkpoints" / name).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    words = ["pretrain", "--config", str(path), "--train.max_steps=7"]
    ((status, said),) = workers.run(runs.command, words, world_size=1, process_group=False)
    assert status == 0 and "checkpoint step_00000006 is damaged" in said
    ours, theirs = steps_of(folder), steps_of(straight)[:7]
    for name in runs.EXACT:
        assert [line[name] for line in ours] == [line[name] for line in theirs], name


def test_the_tiny_recipe_runs_through(workers: WorkerPool, tiny_corpus: dict[str, Any], tmp_path: Path) -> None:
    """All of it, with a model of two narrow layers on a smaller corpus."""
    model = dict(runs.SETTINGS["model"], num_layers=2)
    groups = {"model": model, "data": {**tiny_corpus, "embedded_corpus": "none"}}
    words = [
        f"--{group}.{name}={','.join(value) if isinstance(value, list) else value}"
        for group, values in groups.items()
        for name, value in values.items()
    ]
    words += [f"--run.folder={tmp_path}/run", "--parallel.expert_model_parallel_size=1", "--run.save_interval=0"]
    words = ["pretrain", "--config", str(RECIPE), *words]
    ((status, _),) = workers.run(runs.command, words, world_size=1, process_group=False)
    assert status == 0
    steps = steps_of(tmp_path / "run")
    stages = load_config(RECIPE).stages
    assert [line["stage"] for line in steps] == sorted(line["stage"] for line in steps)
    assert {line["stage"] for line in steps} == set(range(1, len(stages) + 1))
    assert steps[-1]["tokens"] >= sum(stage.tokens for stage in stages) == 210_000
    assert [line["lr"] for line in steps if line["stage"] == 1][-1] == 1e-3
    assert steps[-1]["lr"] == pytest.approx(3e-5, rel=0.1)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0
