"""A run of two stages that goes back from the second to the end of the first."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_m1.checkpoint.store import CheckpointError
from megatron_m1.runtime import mesh
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.loop import open_trainer
from tests.training import loop_runs as runs
from tests.training.spike_runs import BATCH, GUARD, SEQUENCE, SPIKE, garbage_data, said, steps_of
from tests.training.staged_runs import write_recipe

pytestmark = pytest.mark.slow

FIRST, STEPS = 7, 12
"""Steps of the first stage and of the run: the spike is in the second step of the second stage, which has no
checkpoint of its own by then."""
TOKENS = BATCH * SEQUENCE
"""Of a step."""
STAGES = [
    {"name": "early", "tokens": FIRST * TOKENS},
    {
        "name": "late",
        "tokens": (STEPS - FIRST) * TOKENS,
        "data": {"packing": "best_fit"},
        "model": {"rotary_base": 5.0e4},
        "optimizer": {"lr_segments": ["linear", str((STEPS - FIRST) * TOKENS), "1e-3"]},
    },
]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: dict[str, Any]) -> Callable[[], Path]:
    """``write()`` -> YAML of a run in the folder ``run`` beside it."""
    data = garbage_data(tmp_path_factory.mktemp("garbage"), tiny_corpus)

    def write() -> Path:
        root = tmp_path_factory.mktemp("stages")
        settings = [*GUARD, ("train.max_steps", None), ("train.spike_guard", "rollback")]
        return write_recipe(root / "run.yaml", data, root / "run", STAGES, *settings)

    return write


@pytest.fixture(scope="module")
def back(workers: WorkerPool, write: Callable[[], Path]) -> tuple[Path, str]:
    """Folder and output of a run that goes back to the end of the first stage."""
    path = write()
    ((status, printed),) = workers.run(said, path, world_size=1, process_group=False)
    assert status == 0
    return path.parent / "run", printed


def test_it_goes_on_in_the_second_stage(back: tuple[Path, str]) -> None:
    folder, printed = back
    went = [line for line in printed.splitlines() if line.startswith("went back to")]
    assert went == ["went back to step_00000007; the data go on behind the spike, 8 packs later"]
    assert steps_of(folder, "step") == list(range(1, STEPS + 1))
    assert steps_of(folder, "stage") == [1] * FIRST + [2] * (STEPS - FIRST)
    assert steps_of(folder, "tokens") == [TOKENS * step for step in range(1, STEPS + 1)]
    assert steps_of(folder, "spikes") == [0] * FIRST + [1] * (STEPS - FIRST)
    # The second stage's schedule, from its beginning.
    rates = [3e-3 - step / (STEPS - FIRST) * 2e-3 for step in range(1, STEPS - FIRST + 1)]
    assert steps_of(folder, "lr")[FIRST:] == pytest.approx(rates)
    state = json.loads((folder / "checkpoints" / "step_00000012" / "state.json").read_text())
    assert state["stages"] == {"early": 0, "late": FIRST * TOKENS}
    # The batches of steps 8 and 9, as they were tried first, are left out.
    assert state["stream"]["packs"] == state["consumed_samples"] == BATCH * (STEPS + SPIKE - FIRST)
    # The stage has begun once.
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"]) for line in starts] == [(0, "early"), (FIRST, "late")]


def test_killed_after_it_went_back_it_goes_on_in_the_second_stage(
    back: tuple[Path, str], workers: WorkerPool, write: Callable[[], Path]
) -> None:
    """The newest checkpoint is that of the first stage; it dies in the next save."""
    path = write()
    folder = path.parent / "run"
    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        workers.run(runs.train_until_killed, path, SPIKE, world_size=1, process_group=False)
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000007\n"
    ((status, printed),) = workers.run(said, path, world_size=1, process_group=False)
    assert status == 0 and "stage late begins after step 7 (" in printed and "went back" not in printed
    assert runs.trace(folder) == runs.trace(back[0])
    assert steps_of(folder, "stage") == steps_of(back[0], "stage")


def what_is_said_of_an_earlier_stage(rank: int, world_size: int, path: Path) -> str:
    """The end of a run that, in its second stage, can go back only into the first one."""
    config = runs.config_of(path, world_size)
    grid = mesh.initialise(config.parallel, seed=config.train.seed)
    with ExitStack() as held:
        trainer = open_trainer(config, grid, held, console=Console(file=io.StringIO()))
        assert trainer is not None
        for checkpoint in trainer.folder.glob("checkpoints/step_00000007/*.distcp"):
            checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
        for number in range(FIRST + 1, SPIKE + 1):
            trainer.step(number)
        with pytest.raises(CheckpointError) as error:
            trainer.go_back()
    return str(error.value)


def test_it_does_not_go_on_in_the_second_stage_from_within_the_first(
    back: tuple[Path, str], workers: WorkerPool, write: Callable[[], Path]
) -> None:
    """The checkpoint between them is damaged: the run ends, and started again it is what it would have been."""
    path, straight = write(), back[0]
    folder = path.parent / "run"
    for name in ("step_00000006", "step_00000007"):
        shutil.copytree(straight / "checkpoints" / name, folder / "checkpoints" / name)
    shutil.copy(straight / "metrics.jsonl", folder)
    (error,) = workers.run(what_is_said_of_an_earlier_stage, path, world_size=1, process_group=False)
    assert error == (
        "step_00000006, the newest checkpoint that can be read, is in a stage before late: "
        "start the run again, which goes on from there"
    )
    workers.run(runs.train, path, world_size=1, process_group=False)
    assert runs.trace(folder) == runs.trace(straight)
    assert steps_of(folder, "stage") == steps_of(straight, "stage")
