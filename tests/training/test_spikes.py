"""Runs whose data have garbage in them: what a spike of the gradient norm does to the run, and what is left of it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.runtime import mesh
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.loop import open_trainer
from megatron_m1.training.progress import Progress
from megatron_m1.training.rollback import with_record
from megatron_m1.training.spike_guard import SpikeError
from tests.training import loop_runs as runs
from tests.training.loop_runs import Setting
from tests.training.spike_runs import GUARD, SPIKE, documents, garbage_data, said, steps_of
from tests.training.test_loop import MESH_TOLERANCE


@pytest.fixture(scope="module")
def garbage(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: dict[str, Any]) -> dict[str, Any]:
    return garbage_data(tmp_path_factory.mktemp("garbage"), tiny_corpus)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, garbage: dict[str, Any]) -> Callable[..., Path]:
    """``settings("skip", ("train.max_steps", 4))`` -> YAML of a run in the folder ``run`` beside it."""

    def write(mode: str, *changes: Setting) -> Path:
        root = tmp_path_factory.mktemp(mode)
        return runs.write_settings(
            root / "run.yaml", garbage, root / "run", *GUARD, ("train.spike_guard", mode), *changes
        )

    return write


def the_error(rank: int, world_size: int, path: Path) -> str:
    """The message with which the run ends."""
    try:
        runs.train(rank, world_size, path)
    except SpikeError as error:
        return str(error)
    return "came to its end"


def what_changes(rank: int, world_size: int, path: Path) -> list[tuple[bool, bool]]:
    """Of the spiking step and the one before it: whether it says that it was applied, and whether it was."""
    config = runs.config_of(path, world_size)
    grid = mesh.initialise(config.parallel, seed=config.train.seed)
    found = []
    with ExitStack() as held:
        trainer = open_trainer(config, grid, held, console=Console(file=io.StringIO()))
        assert trainer is not None
        for number in range(1, SPIKE + 1):
            before = runs._snapshot(trainer)
            result = trainer.step(number)
            found.append((result.updated, not runs._same(trainer, before)))
    return found[-2:]


@pytest.mark.parametrize(("mode", "is_applied"), [("count", True), ("skip", False)])
def test_what_is_done_with_a_spiking_step(
    mode: str, is_applied: bool, workers: WorkerPool, settings: Callable[..., Path]
) -> None:
    path = settings(mode)
    (changes,) = workers.run(what_changes, path, world_size=1, process_group=False)
    assert changes == [(True, True), (is_applied, is_applied)]
    folder = path.parent / "run"
    norms = steps_of(folder, "grad_norm")
    assert norms[-1] > 2 * sorted(norms[:-1])[4]
    assert steps_of(folder, "spikes") == [0] * 8 + [1] and steps_of(folder, "skipped_steps") == [0] * 9
    # The step's gradient by kind and depth, though there is no interval.
    assert [("grad_norm_lightning_eighth_1" in line) for line in runs.records(folder)] == [False] * 8 + [True]
    facts = json.loads((folder / "spikes" / f"step_{SPIKE:08d}_spike_1.json").read_text())
    last = runs.records(folder)[-1]
    assert {name: last[name] for name in facts if name.startswith("grad_norm")} == {
        name: value for name, value in facts.items() if name.startswith("grad_norm")
    }
    assert (facts["step"], facts["spike"]) == (SPIKE, 1) and facts["grad_norm"] > 2 * facts["median"]


@pytest.fixture(scope="module")
def alone(workers: WorkerPool, settings: Callable[..., Path]) -> tuple[Path, str]:
    """Folder and output of a run of one process that skips the spike."""
    path = settings("skip", ("train.grad_norm_interval", 4))
    ((status, printed),) = workers.run(said, path, world_size=1, process_group=False)
    assert status == 0
    return path.parent / "run", printed


def test_the_documents_of_a_spike_are_those_of_its_batch(alone: tuple[Path, str], garbage: dict[str, Any]) -> None:
    folder, printed = alone
    lines = documents(folder, f"step_{SPIKE:08d}_spike_1")
    path = folder / "spikes" / f"step_{SPIKE:08d}_spike_1.jsonl"
    assert f" of 8 steps: not applied; its documents by loss: {path}\n" in printed
    assert sum(line["tokens"] for line in lines) == 4 * 64
    losses = [line["loss"] for line in lines if line["predicted"]]
    assert losses == sorted(losses, reverse=True)
    # The garbage is what the model knows least of.
    assert Path(lines[0]["corpus"]).name == "garbage"
    assert {Path(line["corpus"]).name for line in lines} == {"train", "garbage"}
    assert all(line["max_loss"] >= line["loss"] for line in lines if line["predicted"])
    # The step was not applied: these are the losses that it met.
    total = sum(line["loss"] * line["predicted"] for line in lines if line["predicted"])
    predicted = sum(line["predicted"] for line in lines)
    assert total / predicted == pytest.approx(runs.records(folder)[-1]["loss"], rel=1e-6)
    check_texts(lines, garbage["tokenizer"])


def check_texts(lines: list[dict[str, Any]], tokenizer: str) -> None:
    """Each line spells the beginning of the piece that it names, read from the corpus itself."""
    decode = load_tokenizer(tokenizer).decode
    corpora = {line["corpus"]: IndexedDataset(line["corpus"]) for line in lines}
    for line in lines:
        document = corpora[line["corpus"]][line["document"]]
        piece = document[line["offset"] : line["offset"] + line["tokens"]]
        assert len(piece) == line["tokens"]
        assert line["text"] == decode(piece[:48].tolist())


def test_norms_by_kind_are_recorded_at_the_interval(alone: tuple[Path, str]) -> None:
    having = [line["step"] for line in runs.records(alone[0]) if "grad_norm_experts" in line]
    assert having == [4, 8, SPIKE]


def check_same_documents(folder: Path, other: Path) -> None:
    """Two runs wrote the same of their first spike, but for rounding."""

    def of(place: Path) -> list[dict[str, Any]]:
        # Losses of different documents may be as good as equal.
        lines = documents(place, f"step_{SPIKE:08d}_spike_1")
        return sorted(lines, key=lambda line: (line["corpus"], line["document"], line["offset"]))

    for ours, theirs in zip(of(folder), of(other), strict=True):
        for name in ours:
            if name in ("loss", "max_loss") and ours[name] is not None:
                assert ours[name] == pytest.approx(theirs[name], rel=10 * MESH_TOLERANCE)
            else:
                assert ours[name] == theirs[name]


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, [("parallel.context_parallel_size", 2)]),
        (4, [("parallel.tensor_model_parallel_size", 2), ("parallel.pipeline_model_parallel_size", 2)]),
    ],
    ids=["cp2", "tp2-pp2"],
)
def test_a_mesh_finds_the_same_spike_and_the_same_documents(
    world_size: int,
    changes: list[Setting],
    alone: tuple[Path, str],
    workers: WorkerPool,
    settings: Callable[..., Path],
) -> None:
    # One step more: the ranks go on together.
    path = settings("skip", *changes, ("train.max_steps", SPIKE + 1))
    workers.run(runs.train, path, world_size=world_size, process_group=False)
    folder = path.parent / "run"
    assert steps_of(folder, "spikes") == [0] * 8 + [1, 1]
    check_same_documents(folder, alone[0])


@pytest.fixture(scope="module")
def back(workers: WorkerPool, settings: Callable[..., Path]) -> tuple[Path, str]:
    """YAML and output of a run that goes back to step 6 and later, at step 14, to step 12."""
    path = settings("rollback", ("train.max_steps", 16), ("run.tensorboard", True))
    ((status, printed),) = workers.run(said, path, world_size=1, process_group=False)
    assert status == 0
    return path, printed


def test_a_run_goes_back_and_on_behind_the_batch(back: tuple[Path, str]) -> None:
    folder, printed = back[0].parent / "run", back[1]
    assert [line.split(";")[0] for line in printed.splitlines() if line.startswith("went back to")] == [
        "went back to step_00000006",
        "went back to step_00000012",
    ]
    # Every step stands there once, as if what was left out had never been tried; but it is counted.
    assert steps_of(folder, "step") == list(range(1, 17))
    assert steps_of(folder, "tokens") == [256 * step for step in range(1, 17)]
    assert steps_of(folder, "spikes") == [0] * 6 + [1] * 6 + [2] * 4
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in runs.records(folder)
    ]
    # Three batches were left out with the first spike, two with the second.
    state = json.loads((folder / "checkpoints" / "step_00000016" / "state.json").read_text())
    assert state["consumed_samples"] == 4 * (16 + 3 + 2)
    assert state["tokens"] == 256 * 16
    assert sorted(path.name for path in (folder / "spikes").iterdir()) == [
        *["step_00000009_spike_1.json", "step_00000009_spike_1.jsonl"],
        *["step_00000014_spike_2.json", "step_00000014_spike_2.jsonl"],
    ]
    norms = steps_of(folder, "grad_norm")
    assert max(norms) < 1.5 * median(norms)


def test_a_run_that_is_killed_after_it_went_back_has_the_same_trace(
    back: tuple[Path, str], workers: WorkerPool, settings: Callable[..., Path]
) -> None:
    """It has gone back from step 9 to 6, and dies in the next save."""
    path = settings("rollback", ("train.max_steps", 16))
    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        workers.run(runs.train_until_killed, path, 9, world_size=1, process_group=False)
    folder = path.parent / "run"
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000006\n"
    first = (folder / "spikes" / "step_00000009_spike_1.jsonl").stat().st_mtime_ns
    workers.run(runs.train, path, world_size=1, process_group=False)
    assert runs.trace(folder) == runs.trace(back[0].parent / "run")
    assert steps_of(folder, "spikes") == steps_of(back[0].parent / "run", "spikes")
    # The spike was known, and was not met again.
    assert (folder / "spikes" / "step_00000009_spike_1.jsonl").stat().st_mtime_ns == first


def test_a_run_that_is_resumed_before_a_spike_goes_back_as_well(
    back: tuple[Path, str], workers: WorkerPool, settings: Callable[..., Path]
) -> None:
    """From a checkpoint that knows of no spike, with the norms that it holds."""
    path = settings("rollback", ("train.max_steps", 16))
    folder, straight = path.parent / "run", back[0].parent / "run"
    shutil.copytree(straight / "checkpoints" / "step_00000006", folder / "checkpoints" / "step_00000006")
    # Of a later time: it says nothing of this checkpoint.
    shutil.copy(straight / "checkpoints" / "went_back.json", folder / "checkpoints")
    shutil.copy(straight / "metrics.jsonl", folder)
    workers.run(runs.train, path, world_size=1, process_group=False)
    assert runs.trace(folder) == runs.trace(straight)
    assert steps_of(folder, "spikes") == steps_of(straight, "spikes")


def what_is_refused(rank: int, world_size: int, folder: Path, contents: list[str]) -> list[str]:
    """What is said of each content of the file that tells of a way back."""
    messages = []
    for content in contents:
        (folder / "went_back.json").write_text(content)
        with pytest.raises(ValueError, match="went_back") as refused:
            with_record(folder, Progress(step=6))
        messages.append(str(refused.value))
    return messages


def test_a_record_of_no_way_back_is_one_line(workers: WorkerPool, tmp_path: Path) -> None:
    rest = '"stages": {}, "stream": null'
    contents = [
        *["", "[]", '{"step": 6}', f'{{"step": 6, "consumed_samples": -1, "spike_guard": {{}}, {rest}}}'],
        f'{{"step": 6, "consumed_samples": true, "spike_guard": {{}}, {rest}}}',
        f'{{"step": 6, "consumed_samples": 1, "more": 1, {rest}}}',
        f'{{"step": 6, "consumed_samples": 1, "spike_guard": {{"total": 1}}, {rest}}}',
        '{"step": 6, "consumed_samples": 1, "spike_guard": {}, "stages": [], "stream": null}',
        '{"step": 6, "consumed_samples": 1, "spike_guard": {}, "stages": {}, "stream": 3}',
    ]
    (messages,) = workers.run(what_is_refused, tmp_path, contents, world_size=1)
    assert len(messages) == len(contents) and not any("\n" in line for line in messages)
    assert messages[
        2
    ] == f"{tmp_path / 'went_back.json'} is no record of a run that went back (it has other names): " + (
        "remove it to go on from the checkpoint alone"
    )


def test_data_parallel_ranks_go_back_together(
    back: tuple[Path, str], workers: WorkerPool, settings: Callable[..., Path]
) -> None:
    overlap: list[Setting] = [("parallel.overlap_grad_reduce", True), ("parallel.overlap_param_gather", True)]
    path = settings("rollback", ("train.max_steps", SPIKE), ("run.async_save", True), *overlap)
    first, second = workers.run(runs.train, path, world_size=2, process_group=False)
    assert first == second and first["step"] == SPIKE
    folder, straight = path.parent / "run", back[0].parent / "run"
    assert steps_of(folder, "spikes") == [0] * 6 + [1] * 3
    assert steps_of(folder, "loss") == pytest.approx(steps_of(straight, "loss")[:SPIKE], rel=10 * MESH_TOLERANCE)
    check_same_documents(folder, straight)


def test_without_a_checkpoint_the_step_is_skipped(workers: WorkerPool, settings: Callable[..., Path]) -> None:
    path = settings("rollback", ("run.save_interval", 0), ("train.max_steps", SPIKE + 1))
    ((status, printed),) = workers.run(said, path, world_size=1, process_group=False)
    assert status == 0
    assert f"step {SPIKE}: there is no checkpoint to go back to; the step is skipped\n" in printed
    folder = path.parent / "run"
    assert steps_of(folder, "step") == list(range(1, SPIKE + 2))
    assert steps_of(folder, "spikes") == [0] * 8 + [1, 1]
    assert not (folder / "checkpoints" / "went_back.json").exists()


def test_stop_ends_the_run_with_status_1(workers: WorkerPool, settings: Callable[..., Path]) -> None:
    path = settings("stop", ("train.max_steps", SPIKE + 1))
    ((status, printed),) = workers.run(said, path, world_size=1, process_group=False)
    assert status == 1
    folder = path.parent / "run"
    assert steps_of(folder, "spikes") == [0] * 8 + [1]
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000006\n"
    assert "its documents by loss" in printed and documents(folder, f"step_{SPIKE:08d}_spike_1")


def test_a_run_that_goes_back_again_and_again_ends(workers: WorkerPool, settings: Callable[..., Path]) -> None:
    """Every gradient above 1.01 times the median is a spike: it never comes far."""
    changes: list[Setting] = [("train.spike_factor", 1.01), ("train.max_spikes", 3), ("train.max_steps", 99)]
    path = settings("rollback", *changes)
    messages = workers.run(the_error, path, world_size=2, process_group=False)
    assert messages[0] == messages[1]
    assert "3 spikes within 8 steps (train.max_spikes)" in messages[0]
    assert steps_of(path.parent / "run", "spikes")[-1] == 3
