"""Files of strangers: what they name is never called, never read outside their folder, never made room for.

Each hostile pickle would write a marker file. Every reader must refuse it in one line, and the marker stays away.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_m1 import cli
from megatron_m1.checkpoint import folder as folders
from megatron_m1.checkpoint.metadata import only_tensors, read_metadata
from tests.checkpoint.checkpoint_runs import open_checkpoints
from tests.convert import runs
from tests.convert.conftest import Run
from tests.harness import WorkerPool
from tests.model.meshes import start
from tests.reference.transformers_minimax import build


class _Shell:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._marker}",)


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that native transformers has saved."""
    folder = tmp_path_factory.mktemp("native") / "model"
    shape: dict[str, Any] = dict(layers=2, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=8, experts=4, vocab=20)
    build(**shape, rotary_dim=8, rope_theta=1e4, softmax_every=2, alpha=2.0, seed=4).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(fp32_run: Run, tmp_path: Path) -> Path:
    """A copy of a run's checkpoint, alone in a run folder."""
    target = tmp_path / "run" / "checkpoints" / fp32_run.checkpoint.name
    shutil.copytree(fp32_run.checkpoint, target)
    return target


def seal(checkpoint: Path) -> None:
    """Give a checkpoint the hashes of what it has: integrity alone is no protection."""
    names = [path.name for path in checkpoint.iterdir() if path.name != folders.MANIFEST]
    files = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    (checkpoint / folders.MANIFEST).write_text(json.dumps({"algorithm": "sha256", "files": files}))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must end with status 2 and one line."""
    capsys.readouterr()
    assert cli.exit_status(lambda: cli.run([str(word) for word in words])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("megatron-m1: error: "), err
    return err


def commands(checkpoint: Path, tmp_path: Path) -> list[list[object]]:
    run = checkpoint.parents[1]
    start = ["pretrain", "--init-from", run, "--run.folder", tmp_path / "new", "--dry-run", "--data.train", "x"]
    return [
        ["inspect", checkpoint],
        ["convert", "to-hf", run, tmp_path / "out"],
        ["generate", run, "--prompt", "a"],
        start,
    ]


@pytest.mark.parametrize("sealed", [True, False])
def test_a_pickle_in_the_metadata_is_not_run(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sealed: bool
) -> None:
    marker = tmp_path / "marker"
    metadata = checkpoint / ".metadata"
    whole = pickle.loads(metadata.read_bytes())
    whole.planner_data = _Shell(marker)
    metadata.write_bytes(pickle.dumps(whole))
    if sealed:
        seal(checkpoint)
    expected = "wants posix.system, which is no part of a checkpoint" if sealed else ".metadata is not what was saved"
    for words in commands(checkpoint, tmp_path):
        assert expected in refused(capsys, *words), words
    assert not marker.exists()


def resume(rank: int, world_size: int, folder: Path) -> str:
    """Load the run's newest checkpoint as training does; what it says when it can't."""
    try:
        config = runs.config_of({})
        trained = start(config, world_size)
        open_checkpoints(folder / "checkpoints", config).load_newest(trained)
    except (ValueError, RuntimeError) as error:
        return f"{error} / {error.__cause__}"
    return "loaded"


def test_resuming_runs_no_pickle(checkpoint: Path, tmp_path: Path, workers: WorkerPool) -> None:
    """Neither in the metadata nor in what a data file has besides tensors, which megatron-core unpickles."""
    marker = tmp_path / "marker"
    run = checkpoint.parents[1]
    assert workers.run(resume, run, world_size=1) == ["loaded"]
    metadata = read_metadata(checkpoint)
    (index,) = (index for index in metadata.storage_data if index.fqn.startswith("common_state/"))
    payload = io.BytesIO()
    torch.save({"optimizer_step": 1, "more": _Shell(marker)}, payload)
    (checkpoint / "__9_0.distcp").write_bytes(payload.getvalue())
    metadata.storage_data[index] = replace(
        metadata.storage_data[index], relative_path="__9_0.distcp", offset=0, length=len(payload.getvalue())
    )
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    assert "a data file wants posix.system, which is no part" in workers.run(resume, run, world_size=1)[0]
    assert not marker.exists()
    metadata.planner_data = _Shell(marker)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    assert "posix.system" in workers.run(resume, run, world_size=1)[0]
    assert not marker.exists()


def test_the_switch_of_torch_still_works(tmp_path: Path) -> None:
    """``only_tensors`` relies on it, also where the environment says otherwise."""
    stream = io.BytesIO()
    torch.save(_Shell(tmp_path / "marker"), stream)
    stream.seek(0)
    before = dict(os.environ)
    with only_tensors(), pytest.raises(pickle.UnpicklingError):
        torch.load(stream, weights_only=False)
    assert dict(os.environ) == before and not (tmp_path / "marker").exists()


def change_metadata(checkpoint: Path, change: Callable[[Any], None]) -> None:
    metadata = read_metadata(checkpoint)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)


def _larger(metadata: Any) -> None:
    name = "embedding.word_embeddings.weight"
    tensor = metadata.state_dict_metadata[name]
    chunk = replace(tensor.chunks[0], sizes=torch.Size([1 << 40, 48]), offsets=torch.Size([0, 0]))
    metadata.state_dict_metadata[name] = replace(tensor, size=torch.Size([1 << 40, 48]), chunks=[chunk])


def _moved(place: dict[str, Any]) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        index = next(iter(metadata.storage_data))
        metadata.storage_data[index] = replace(metadata.storage_data[index], **place)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_moved({"relative_path": "../../secret"}), "names the file '../../secret', which is not in the checkpoint's"),
        (_moved({"relative_path": "/etc/passwd"}), "names the file '/etc/passwd'"),
        (_moved({"length": 1 << 50}), "bytes, not 11258"),
        (_moved({"offset": -4}), ".metadata can't be read"),
        (_larger, ".metadata can't be read"),
    ],
    ids=["up", "absolute", "long", "negative", "large"],
)
def test_metadata_that_lead_elsewhere(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], None], message: str
) -> None:
    change_metadata(checkpoint, change)
    assert message in refused(capsys, "inspect", checkpoint)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/b"])
def test_a_manifest_that_leads_elsewhere(checkpoint: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = checkpoint / folders.MANIFEST
    content = json.loads(path.read_text())
    content["files"][name] = "0" * 64
    path.write_text(json.dumps(content))
    assert f"names {name!r}, which is not in the checkpoint's folder" in refused(capsys, "inspect", checkpoint)


@pytest.mark.parametrize(
    "change", ["num_layers: 1000000000000000", "vocab_size: 100000000000000", "kv_channels: 1000000"]
)
def test_a_configuration_of_a_huge_model(checkpoint: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    """It would be built before its tensors are looked at."""
    field, _, value = change.partition(": ")
    path = checkpoint / folders.CONFIG
    content = yaml.safe_load(path.read_text())
    content["model"][field] = int(value)
    path.write_text(yaml.safe_dump(content))
    seal(checkpoint)
    if field == "num_layers":
        assert "model.num_layers = 1000000000000000" in refused(capsys, "inspect", checkpoint)
    for words in commands(checkpoint, checkpoint.parents[2])[1:]:
        assert "the model of its config.yaml" in refused(capsys, *words)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"files": ' + "[" * 100_000, "{", "[]"])
def test_nested_manifests(checkpoint: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (checkpoint / folders.MANIFEST).write_text(text)
    assert "integrity.json can't be read" in refused(capsys, "inspect", checkpoint)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_leads_elsewhere(
    native_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(native_folder, folder)
    names = [name for path in folder.glob("*.safetensors") for name in _names(path)]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    assert f"names the file {file!r}" in refused(capsys, "convert", "from-hf", folder, tmp_path / "out")


def _names(path: Path) -> list[str]:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return [name for name in json.loads(stream.read(length)) if name != "__metadata__"]


def test_pickled_weights_are_never_read(
    native_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = tmp_path / "hub", tmp_path / "marker"
    folder.mkdir()
    shutil.copy(native_folder / "config.json", folder)
    torch.save(_Shell(marker), folder / "pytorch_model.bin")
    assert "has neither model.safetensors.index.json" in refused(capsys, "convert", "from-hf", folder, tmp_path / "out")
    assert not marker.exists()


def test_experts_without_end(native_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(native_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 1 << 50}))
    assert "experts, but there are" in refused(capsys, "convert", "from-hf", folder, tmp_path / "out")


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    for name in ("step_00000003.tmp", "step_00000004.tmp"):
        (root / name).symlink_to(elsewhere)
    folders.start(root, 3)
    folders.remove_temporary(root)
    (root / "step_00000005").symlink_to(elsewhere)
    folders.remove_old(root, 1)
    (root / "step_00000006").mkdir()
    folders.remove_old(root, 1)
    assert (elsewhere / "kept").read_text() == "kept"
    assert sorted(path.name for path in root.iterdir()) == ["step_00000006"]
