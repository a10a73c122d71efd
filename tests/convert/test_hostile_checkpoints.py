"""Checkpoints of strangers that are odd in other ways than code: one line each, no hang, no traceback, no guess."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_m1.checkpoint import folder as folders
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.progress import stored_progress
from tests.convert.hostile import Shell, change_metadata, commands, refused, replace_object, resume, seal


def test_metadata_that_number_what_is_not_there(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """C's unpickler would make room for 16 million of them: 256 MB for 5 bytes."""
    path = checkpoint / folders.METADATA
    content = path.read_bytes()
    assert content.startswith(b"\x80\x04\x95") and content[11:12] != b"."
    path.write_bytes(b"\x80\x04Nr" + (1 << 24).to_bytes(4, "little") + b"0" + content[11:])
    seal(checkpoint)
    assert ".metadata can't be read (ValueError)" in refused(capsys, "inspect", checkpoint)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    "name", ["config.yaml", "state.json", ".metadata", "metadata.json", "integrity.json", "resolved.yaml"]
)
def test_a_pipe_is_not_waited_for(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, sealed: bool
) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    if not sealed and name != folders.MANIFEST:
        (checkpoint / folders.MANIFEST).unlink()
    for words in commands(checkpoint, tmp_path):
        assert str(checkpoint.parents[1]) in refused(capsys, *words), words


def test_a_device_in_place_of_data(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sorted(checkpoint.glob("*.distcp"))[0]
    path.unlink()
    path.symlink_to("/dev/zero")
    assert f"{path} can't be read: no regular file" in refused(capsys, "inspect", checkpoint)


@pytest.mark.parametrize("name", ["config.yaml", ".metadata", "metadata.json", "state.json", "*.distcp"])
def test_a_manifest_names_all_that_is_believed(checkpoint: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    name = next(path.name for path in checkpoint.glob(name))
    path = checkpoint / folders.MANIFEST
    content = json.loads(path.read_text())
    del content["files"][name]
    path.write_text(json.dumps(content))
    assert f"integrity.json does not name {name}" in refused(capsys, "inspect", checkpoint)


def test_what_a_configuration_became_is_believed_no_more_than_itself(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / folders.RESOLVED).write_text("model: 5")
    for words in commands(checkpoint, tmp_path)[:2]:
        assert "integrity.json does not name resolved.yaml" in refused(capsys, *words)
    seal(checkpoint)
    for words in commands(checkpoint, tmp_path)[:2]:
        assert f"config file {checkpoint / folders.RESOLVED}: model must hold fields" in refused(capsys, *words)


def test_data_in_a_file_of_another_kind(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def move(metadata: Any) -> None:
        for storage in metadata.storage_data.values():
            storage.relative_path = "state.json"

    change_metadata(checkpoint, move)
    assert "names the file 'state.json', which is no .distcp file" in refused(capsys, "inspect", checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "metadata.json is no JSON object"),
        ("{", "metadata.json is no valid JSON"),
        ("[" * 100_000, "metadata.json is no valid JSON"),
        ("{}", "metadata.json has sharded_backend = None, not 'torch_dist'"),
        ('{"sharded_backend": "zarr"}', "has sharded_backend = 'zarr', not"),
        ('{"sharded_backend": "torch_dist", "sharded_backend_version": 7}', "sharded_backend_version = 7, not 1"),
        ('{"sharded_backend": "%s"}' % ("x" * 10_000_000), "x...x"),
    ],
    ids=["list", "torn", "deep", "empty", "backend", "version", "long"],
)
def test_formats_that_nobody_has(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (checkpoint / "metadata.json").write_text(text)
    seal(checkpoint)
    for words in commands(checkpoint, tmp_path)[:2]:
        error = refused(capsys, *words)
        assert message in error and len(error) < 3000


@pytest.mark.parametrize(
    "text",
    ["model: 5", "[model]", "? [a]\n: b", "model: {num_layers: 2001-99-99}", "a\0b", "[" * 3000, 'preset: !!int ""'],
)
def test_odd_configurations(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (checkpoint / folders.CONFIG).write_text(text)
    seal(checkpoint)
    for words in commands(checkpoint, tmp_path)[:2]:
        assert f"config file {checkpoint / 'config.yaml'}" in refused(capsys, *words)


STATE = {"step": 1, "tokens": 4, "consumed_samples": 4, "train_samples": 9, "skipped_total": 0, "skipped_in_row": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "besides what a run has: 'more'"),
        ({"tokens": 2.5}, "has tokens = 2.5, which is no count"),
        ({"skipped_total": -1}, "has skipped_total = -1,"),
        ({"train_samples": True}, "has train_samples = True,"),
        ({"consumed_samples": 1 << 4000}, "has consumed_samples = a number of 4,001 bits,"),
    ],
)
def test_states_of_no_run(change: dict[str, Any], message: str) -> None:
    assert stored_progress(STATE).consumed_samples == 4
    with pytest.raises(ValueError, match=message):
        stored_progress(STATE | change)
    with pytest.raises(ValueError, match="lacks, or has besides what a run has: 'tokens'"):
        stored_progress({name: value for name, value in STATE.items() if name != "tokens"})


def test_resuming_from_odd_files_is_one_line(checkpoint: Path, workers: WorkerPool) -> None:
    run, path = checkpoint.parents[1], checkpoint / folders.STATE
    state = path.read_text()
    for text, message in (
        ("[]", "state.json is no JSON object"),
        ('{"step": 7}', "state.json is of step 7"),
        ('{"step": {"a": 1}}', "state.json is of step {'a': 1}"),
    ):
        path.write_text(text)
        seal(checkpoint)
        assert message in workers.run(resume, run, world_size=1)[0]
    path.write_text(state)
    for content, message in (
        ([{"optimizer_step": "one"}], "its optimizer_step is 'one'"),
        ([["optimizer_step"]], "can't be loaded (ValueError"),
        ([{"optimizer_step": 1, "model0": {"strange": torch.zeros(1)}}], "is not of this model: "),
        ("text", "can't be loaded ("),
    ):
        replace_object(checkpoint, "common_state/", content)
        assert message in workers.run(resume, run, world_size=1)[0]


def test_pieces_that_are_no_tensors(checkpoint: Path, workers: WorkerPool) -> None:
    for path in checkpoint.glob("*.distcp"):
        path.write_bytes(b"\x80\x02" * (path.stat().st_size // 2 + 1))
    seal(checkpoint)
    assert "can't be loaded (" in workers.run(resume, checkpoint.parents[1], world_size=1)[0]
    (checkpoint / "common.pt").write_bytes(b"")
    seal(checkpoint)
    assert "common.pt is no part of a checkpoint" in workers.run(resume, checkpoint.parents[1], world_size=1)[0]


def test_extra_states_are_not_unpickled(checkpoint: Path, tmp_path: Path, workers: WorkerPool) -> None:
    """transformer-engine's layers would unpickle what an extra state holds, as megatron-core hands it on."""
    marker = tmp_path / "marker"
    run = checkpoint.parents[1]
    name = "decoder.layers.0.self_attention.linear_proj._extra_state"
    for state, message in (
        (pickle.dumps(Shell(marker)), "posix.system"),
        (b"\x80\x04Nr\0\0\0\x01.", "asks for room for 16777216"),
    ):
        replace_object(checkpoint, name, [torch.frombuffer(bytearray(state), dtype=torch.uint8)])
        answer = workers.run(resume, run, world_size=1)[0]
        assert f"is refused: {name}" in answer and message in answer
    harmless = pickle.dumps({"extra_fp8_variables": {}, "scale_fwd": 1.0})
    replace_object(checkpoint, name, [torch.frombuffer(bytearray(harmless), dtype=torch.uint8)])
    assert workers.run(resume, run, world_size=1) == ["loaded"]
    assert not marker.exists()
