"""Checkpoints go from any mesh to any other, and survive damage, kills and full disks."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_m1.checkpoint import folder as folders
from megatron_m1.checkpoint.folder import checkpoint_folders, remove_old, step_of
from megatron_m1.checkpoint.store import CheckpointError
from megatron_m1.config import Config
from megatron_m1.config.io import load_config
from megatron_m1.runtime.pool import WorkerPool
from tests.checkpoint import checkpoint_runs as runs
from tests.checkpoint.checkpoint_runs import run_config

MESH_TOLERANCE = 1e-6
"""Relative; meshes sum the same fp32 numbers in another order, and the loss is a mean over 160 tokens."""

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "dp2": (2, {}),
    "cp2-dp2": (4, {"context_parallel_size": 2}),
    "cp3": (3, {"context_parallel_size": 3}),
    "dp2-overlap": (2, OVERLAP),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "pp2-interleaved": (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    # The first stage has no layer, so no expert part in its optimizer.
    "pp2-uneven": (2, PP2 | {"pipeline_model_parallel_layout": "E|t*4L"}),
    "ep2": (2, EP2),
    "tp2-pp2": (4, TP2 | PP2),
    "ep2-etp2": (4, TP2 | EP2 | {"expert_tensor_parallel_size": 2}),
}


def names(step: int) -> str:
    return f"step_{step:08d}"


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("single", "tp2"),
        ("tp2-pp2", "ep2"),
        ("pp2-interleaved", "dp2"),
        ("ep2-etp2", "single"),
        ("dp2-overlap", "pp2"),
        ("tp2", "dp2-overlap"),
        ("pp2-uneven", "ep2"),
        ("dp2", "pp2-uneven"),
        ("cp2-dp2", "cp3"),
        ("cp3", "tp2"),
    ],
)
def test_another_mesh_goes_on(workers: WorkerPool, tmp_path: Path, saved: str, loaded: str) -> None:
    world_size, parallel = MESHES[saved]
    straight = workers.run(runs.save_while_training, run_config(parallel), tmp_path, 4, [2], world_size=world_size)
    world_size, parallel = MESHES[loaded]
    resumed = workers.run(runs.resume, run_config(parallel), tmp_path, 4, world_size=world_size)
    for trace in resumed:
        assert trace.state == runs.state_at(2) and trace.notes == []
        for ours, theirs in zip(trace.figures, straight[0].figures[2:], strict=True):
            assert ours == pytest.approx(theirs, rel=MESH_TOLERANCE)


@pytest.mark.parametrize(
    ("mesh", "precision", "background"),
    [("dp2", "fp32", False), ("tp2", "bf16", False), ("pp2-interleaved", "bf16", True), ("dp2-overlap", "bf16", True)],
)
def test_the_same_mesh_goes_on_bit_for_bit(
    workers: WorkerPool, tmp_path: Path, mesh: str, precision: str, background: bool
) -> None:
    world_size, parallel = MESHES[mesh]
    config = run_config(parallel, {"precision": precision})
    straight = workers.run(runs.save_while_training, config, tmp_path, 4, [2], background, world_size=world_size)
    resumed = workers.run(runs.resume, config, tmp_path, 4, world_size=world_size)
    for ours, theirs in zip(resumed, straight, strict=True):
        assert ours.figures == theirs.figures[2:]
        assert ours.prints == theirs.prints
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    for name, dtype in {name: dtype for trace in resumed for name, dtype in trace.dtypes.items()}.items():
        kept = name.endswith("mlp.router.weight") or name == "output_layer.weight"
        assert dtype == (torch.float32 if kept else low), name


def test_a_bf16_checkpoint_has_fp32_router_and_head_and_no_slopes(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(runs.save_while_training, run_config({}, {"precision": "bf16"}), tmp_path, 1, [1], world_size=1)
    metadata = FileSystemReader(tmp_path / names(1)).read_metadata().state_dict_metadata
    assert not [name for name in metadata if "slope" in name]
    stored = {
        name: entry.properties.dtype for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)
    }
    fp32 = {name for name, d in stored.items() if d == torch.float32 and not name.startswith("optimizer.")}
    assert fp32 == {"output_layer.weight", *(f"decoder.layers.{i}.mlp.router.weight" for i in range(4))}
    assert {dtype for name, dtype in stored.items() if name.startswith("optimizer.")} == {torch.float32}


def test_before_the_first_step(workers: WorkerPool, tmp_path: Path) -> None:
    """There is no optimizer state yet; a save (a signal during the first step) must not invent any."""
    straight = workers.run(runs.save_while_training, run_config(PP2), tmp_path, 2, [0], world_size=2)
    resumed = workers.run(runs.resume, run_config(PP2), tmp_path, 2, world_size=2)
    assert [t.figures for t in resumed] == [t.figures for t in straight]
    assert [t.prints for t in resumed] == [t.prints for t in straight]


def test_a_background_save_holds_what_was_there_when_it_began(workers: WorkerPool, tmp_path: Path) -> None:
    config = run_config(TP2)
    straight = workers.run(runs.save_while_training, config, tmp_path / "sync", 2, [1], world_size=2)
    workers.run(runs.poisoned_background_save, config, tmp_path / "background", world_size=2)
    resumed = workers.run(runs.resume, config, tmp_path / "background", 2, world_size=2)
    assert [t.prints for t in resumed] == [t.prints for t in straight]


def test_weights_alone(workers: WorkerPool, tmp_path: Path) -> None:
    low = run_config({}, {"precision": "bf16"})
    workers.run(runs.save_while_training, low, tmp_path, 2, [2], world_size=1)
    (ours,) = workers.run(runs.load_weights_only, low, tmp_path / names(2), world_size=1)
    (theirs,) = workers.run(runs.set_weights, low, low, 2, world_size=1)
    assert ours == theirs


def test_a_checkpoint_of_another_shape_is_refused(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(runs.save_while_training, run_config({}), tmp_path, 1, [1], world_size=1)
    with pytest.raises(ValueError, match=r"^model\.num_moe_experts is 2, but checkpoint .* has 4: restore it"):
        workers.run(runs.resume, run_config({}, num_moe_experts=2), tmp_path, 2, world_size=1)
    with pytest.raises(
        ValueError, match=r"^model\.mixers makes layer 0 softmax, but in checkpoint .* it is lightning:"
    ):
        workers.run(runs.resume, run_config({}, mixers=["softmax", "lightning"]), tmp_path, 2, world_size=1)


def test_a_checkpoint_from_before_there_were_mixers_goes_on(workers: WorkerPool, tmp_path: Path) -> None:
    """Its config.yaml has a period; the run lists every layer, which is the same model."""
    (whole,) = workers.run(runs.save_while_training, run_config({}), tmp_path, 2, [1], world_size=1)
    (checkpoint,) = tmp_path.glob("step_*")
    config = checkpoint / folders.CONFIG
    lines = config.read_text().splitlines(keepends=True)
    lines = [line for line in lines if line.split(":")[0].strip() not in ("ffns", "residual")]
    lines = ["  attention_period: 2\n" if line.startswith("  mixers:") else line for line in lines]
    config.write_text("".join(lines))
    manifest = json.loads((checkpoint / folders.MANIFEST).read_text())
    manifest["files"][folders.CONFIG] = hashlib.sha256(config.read_bytes()).hexdigest()
    (checkpoint / folders.MANIFEST).write_text(json.dumps(manifest))
    now = run_config({}, mixers=["lightning", "softmax"] * 2)
    (resumed,) = workers.run(runs.resume, now, tmp_path, 2, world_size=1)
    assert resumed.figures == whole.figures[1:] and resumed.prints == whole.prints


def remove_data(checkpoint: Path) -> str:
    (checkpoint / "__0_0.distcp").unlink()
    return "__0_0.distcp is missing"


def truncate_data(checkpoint: Path) -> str:
    path = checkpoint / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    return "__0_0.distcp is not what was saved"


def flip_a_byte(checkpoint: Path) -> str:
    path = checkpoint / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "__0_0.distcp is not what was saved"


def remove_commit_mark(checkpoint: Path) -> str:
    (checkpoint / "metadata.json").unlink()
    return "metadata.json is missing"


def remove_manifest(checkpoint: Path) -> str:
    (checkpoint / "integrity.json").unlink()
    return "integrity.json is missing"


def tear_manifest(checkpoint: Path) -> str:
    os.truncate(checkpoint / "integrity.json", 100)
    return "integrity.json can't be read"


def remove_all(checkpoint: Path) -> str:
    shutil.rmtree(checkpoint)
    return "latest names it, but it is missing"


@pytest.fixture(scope="module")
def two_checkpoints(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Checkpoints of steps 1 and 2 of a run of three steps, and its trace."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    (trace,) = workers.run(runs.save_while_training, run_config({}), folder, 3, [1, 2], world_size=1)
    return folder, trace.figures


@pytest.mark.parametrize(
    "damage",
    [remove_data, truncate_data, flip_a_byte, remove_commit_mark, remove_manifest, tear_manifest, remove_all],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    workers: WorkerPool, tmp_path: Path, two_checkpoints: tuple[Path, list[Any]], damage: Callable[[Path], str]
) -> None:
    original, figures = two_checkpoints
    folder = tmp_path / "checkpoints"
    shutil.copytree(original, folder)
    fault = damage(folder / names(2))
    (trace,) = workers.run(runs.resume, run_config({}), folder, 3, world_size=1)
    assert trace.notes == [f"checkpoint {names(2)} is damaged ({fault}): falling back to the one before"]
    assert trace.state == runs.state_at(1)
    assert trace.figures == figures[1:]
    aside = [] if damage is remove_all else [f"{names(2)}.damaged"]
    assert sorted(os.listdir(folder)) == ["latest", names(1), *aside]
    assert (folder / "latest").read_text() == f"{names(1)}\n"


def test_all_are_kept(tmp_path: Path) -> None:
    for step in range(5):
        (tmp_path / names(step)).mkdir()
    remove_old(tmp_path, 0)
    assert sorted(os.listdir(tmp_path)) == [names(step) for step in range(5)]


def test_steps_beyond_eight_digits_are_newer(tmp_path: Path) -> None:
    for step in (9, 100_000_000, 99_999_999):
        (tmp_path / names(step)).mkdir()
    (tmp_path / "step_00000010.tmp").mkdir()
    (tmp_path / "step_00000011.damaged").mkdir()
    assert [step_of(path) for path in checkpoint_folders(tmp_path)] == [100_000_000, 99_999_999, 9]
    remove_old(tmp_path, 1)
    assert [step_of(path) for path in checkpoint_folders(tmp_path)] == [100_000_000]


def test_every_rank_agrees_on_the_damage(
    workers: WorkerPool, tmp_path: Path, two_checkpoints: tuple[Path, list[Any]]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints[0], folder)
    flip_a_byte(folder / names(2))
    traces = workers.run(runs.resume, run_config(TP2), folder, 1, world_size=2)
    assert [len(trace.notes) for trace in traces] == [1, 0]
    assert [trace.state for trace in traces] == [runs.state_at(1)] * 2


def test_nothing_but_damage_does_not_start_afresh(
    workers: WorkerPool, tmp_path: Path, two_checkpoints: tuple[Path, list[Any]]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints[0], folder)
    for step in (1, 2):
        flip_a_byte(folder / names(step))
    with pytest.raises(CheckpointError, match=r"^every checkpoint in .* is damaged: move them away"):
        workers.run(runs.resume, run_config({}), folder, 3, world_size=1)
    assert sorted(os.listdir(folder)) == ["latest", names(1), names(2)]


def test_no_checkpoint(workers: WorkerPool, tmp_path: Path) -> None:
    (trace,) = workers.run(runs.resume, run_config({}), tmp_path / "checkpoints", 1, world_size=1)
    assert trace.state is None and trace.notes == []
    assert not (tmp_path / "checkpoints").exists()


def test_the_newest_are_kept(workers: WorkerPool, tmp_path: Path) -> None:
    held = workers.run(runs.save_and_rotate, run_config({}), tmp_path / "two", 2, world_size=1)[0]
    assert held == [["latest", *(names(s) for s in steps)] for steps in ([1], [1, 2], [2, 3], [3, 4])]
    newest = tmp_path / "two" / names(4)
    assert (tmp_path / "two" / "latest").read_text() == f"{names(4)}\n"
    assert json.loads((newest / "state.json").read_text()) == runs.state_at(4)
    saved: Config = load_config(newest / "config.yaml")
    assert saved.model == run_config({}).model


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk(workers: WorkerPool, tmp_path: Path, world_size: int) -> None:
    """A limit on file sizes stands for the disk; the data files of this model are larger than it."""
    messages = workers.run(runs.failing_save, run_config({}), tmp_path, 20_000, world_size=world_size)
    for message in messages:
        assert message == messages[0] and "\n" not in message
        assert message.startswith(f"checkpoints: {names(2)} can't be written: ") and "File too large" in message
    assert sorted(os.listdir(tmp_path)) == ["latest", names(1), names(3)]


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ("step_00000002.tmp/.metadata.tmp", "Is a directory"),
        ("step_00000002.tmp/metadata.json", "Is a directory"),
        ("step_00000002.tmp/state.json", "Is a directory"),
        ("step_00000002.tmp/integrity.json", "Is a directory"),
    ],
)
def test_a_save_that_fails_at_its_end_is_tried_again(
    workers: WorkerPool, tmp_path: Path, obstacle: str, reason: str
) -> None:
    """A folder where a file belongs stands for a disk that refuses rank 0 alone; the only good checkpoint stays."""
    first, second = workers.run(runs.save_around_obstacles, run_config({}), tmp_path, obstacle, world_size=2)
    assert first[0] == second[0] == [False, True, False]
    assert first[2] == [["latest", names(1)], ["latest", names(1)], ["latest", names(3)]]
    (note,) = first[1]
    assert note == f"checkpoint {names(2)} can't be written: {reason} ({tmp_path / obstacle}): trying again"
    assert second[1] == []


def test_what_a_checkpoint_is_good_without_does_not_fail_it(workers: WorkerPool, tmp_path: Path) -> None:
    (held,) = workers.run(runs.save_around_obstacles, run_config({}), tmp_path, "latest.tmp", world_size=1)
    assert held[0] == [False] * 3
    assert [note.partition(":")[0] for note in held[1]] == [f"checkpoint {names(s)} is saved, but" for s in (2, 3)]
    assert {names(1), names(2), names(3)} <= set(held[2][2]), "nothing was removed after the failure"


@pytest.mark.parametrize("background", [False, True])
def test_one_rank_whose_disk_is_full(workers: WorkerPool, tmp_path: Path, background: bool) -> None:
    ranks = workers.run(runs.save_with_one_full_disk, run_config({}), tmp_path, background, world_size=2)
    (notes, error, held), (silent, same_error, _) = ranks
    assert held == ["latest", names(1)], "keep is 1, and nothing newer is there"
    assert error == same_error and silent == []
    attempts = [2, 3, 4, 5, 6, 7] if background else [2, 2, 3, 3, 4, 4]
    assert [note.split()[1] for note in notes] == [names(step) for step in attempts[:-1]]
    for number, note in enumerate(notes):
        assert "can't be written: File too large (" in note
        assert note.endswith(f": training goes on; the last good one: {names(1)}" if number % 2 else ": trying again")
    assert error.startswith(f"checkpoints: {names(attempts[-1])} can't be written: File too large (")
    assert error.endswith(f" (3 saves in a row); the last good one: {names(1)}")


def test_the_last_save_is_tried_more_often(workers: WorkerPool, tmp_path: Path) -> None:
    (notes, held), (silent, _) = workers.run(runs.last_save, run_config({}), tmp_path, world_size=2)
    assert len(notes) == 2 and all(note.endswith(": trying again") for note in notes) and silent == []
    assert held == ["latest", names(1)]


def test_only_what_a_save_has_left_is_removed(workers: WorkerPool, tmp_path: Path) -> None:
    for name in ("step_00000004.tmp", "step_00000002.old.tmp", "notes.tmp", "step_4.tmp"):
        (tmp_path / name).mkdir()
    for name in ("latest.tmp", "step_00000005.tmp", "thesis.tmp"):
        (tmp_path / name).write_text("mine")
    workers.run(runs.resume, run_config({}), tmp_path, 1, world_size=1)
    assert sorted(os.listdir(tmp_path)) == ["notes.tmp", "step_00000005.tmp", "step_4.tmp", "thesis.tmp"]


def test_an_unwritable_folder(workers: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"^checkpoints: .*checkpoints"):
        workers.run(runs.save_while_training, run_config({}), tmp_path / "checkpoints", 1, [1], world_size=1)


def test_a_kill_in_mid_save_loses_nothing_that_was_finished(workers: WorkerPool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    process = multiprocessing.get_context("forkserver").Process(target=runs.save_for_ever, args=(folder,))
    process.start()
    try:
        assert process.pid is not None
        while not interrupted_in_mid_save(process.pid, folder):
            assert process.is_alive()
    finally:
        process.kill()
        process.join()
    finished = int((folder / "latest").read_text().removeprefix("step_"))
    torn = folder / f"{names(finished + 1)}.tmp"
    assert torn.is_dir()
    (straight,) = workers.run(
        runs.save_while_training, run_config({}), tmp_path / "straight", finished + 1, [], world_size=1
    )
    (resumed,) = workers.run(runs.resume, run_config({}), folder, finished + 1, world_size=1)
    assert resumed.state == runs.state_at(finished) and resumed.notes == []
    assert resumed.figures == straight.figures[finished:]
    assert resumed.prints == straight.prints
    assert not torn.exists()


def interrupted_in_mid_save(pid: int, folder: Path) -> bool:
    """Stop the process when it is seen writing; whether it still was when it stopped. It goes on if not."""

    def is_writing() -> bool:
        return (folder / "latest").exists() and any(folder.glob("step_*[0-9].tmp/*.distcp"))

    if not is_writing():
        return False
    os.kill(pid, signal.SIGSTOP)
    if is_writing():
        return True
    os.kill(pid, signal.SIGCONT)
    return False
