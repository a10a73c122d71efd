"""Damaged sources, and what a disk changes between writing and reading: neither is passed on."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from torch import Tensor

from megatron_m1.cli import run
from megatron_m1.convert import export as exporting
from megatron_m1.convert.export import ExportOptions, export, source_fault
from megatron_m1.convert.families.minimax_m1.weights import WeightPiece
from megatron_m1.convert.hub_folder import open_hub_folder
from megatron_m1.convert.load_hf import LoadOptions, load_hf
from megatron_m1.convert.our_checkpoint import open_checkpoint
from megatron_m1.convert.work import ConversionError, Ranks
from tests.checkpoint.checkpoint_runs import file_size_limit
from tests.convert.folders import convert, prints, source_of, weights
from tests.convert.killed import SHARD


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_a_damaged_checkpoint_is_not_exported(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(hub / "ours", run_folder)
    (data,) = (run_folder / "checkpoints/step_00000000").glob("*.distcp")
    flip(data, data.stat().st_size // 2)
    assert run(["convert", "to-hf", str(run_folder), str(tmp_path / "out"), "--shard-size", f"{SHARD}"]) == 1
    assert capsys.readouterr().err.endswith("is damaged: __0_0.distcp is not what was saved\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    over = Event()
    assert "__0_0.distcp is not what was saved" in str(source_fault(data.parent, Ranks())(over))
    over.set()
    assert source_fault(data.parent, Ranks())(over) is None
    os.truncate(data, 1000)
    with pytest.raises(ValueError, match=r"is damaged: __0_0\.distcp has 1000 bytes, not"):
        run(["convert", "to-hf", str(run_folder), str(tmp_path / "out")])


def cut_off(file: Path) -> str:
    os.truncate(file, file.stat().st_size - 1)
    return r"is damaged: it has [\d,]+ bytes, its header describes [\d,]+$"


def tear_header(file: Path) -> str:
    flip(file, 8)
    return "is no safetensors file or is damaged: its header can't be read$"


def empty(file: Path) -> str:
    os.truncate(file, 0)
    return "is no safetensors file or is damaged: its header can't be read$"


def remove(file: Path) -> str:
    file.unlink()
    return "can't be read: No such file or directory$"


def overlap(file: Path) -> str:
    return edit(file, lambda first, _: first.update(data_offsets=[0, 8])) + r"puts .* at bytes \[0, 8\] of the data$"


def leave_a_gap(file: Path) -> str:
    def move(_: dict[str, Any], last: dict[str, Any]) -> None:
        last["data_offsets"] = [place + 4 for place in last["data_offsets"]]

    return edit(file, move) + r"puts .* of the data$"


def odd_shape(file: Path) -> str:
    edit(file, lambda first, _: first.update(shape=["a"]))
    return "is no safetensors file or is damaged: its header can't be read$"


def eight_bits(file: Path) -> str:
    edit(file, lambda first, _: first.update(dtype="F8_E4M3"))
    return "F8_E4M3 is no dtype of weights: F32, BF16, F16 are$"


def test_a_header_may_name_tensors_in_any_order(hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(hub / "hub", folder)
    file = sorted(folder.glob("*.safetensors"))[3]
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(dict(reversed(header.items()))).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    convert("from-hf", folder, tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "again", "--shard-size", f"{SHARD}")
    assert prints(weights(tmp_path / "again")) == prints(weights(hub / "hub"))


def edit(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
    """Change what the header says of the first and the last tensor; returns how the message begins."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    entries = sorted((e for name, e in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])
    change(entries[0], entries[-1])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return "is damaged: its header "


def rename_a_tensor(file: Path) -> str:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].replace(b"model.layers", b"madel.layers", 1)
    file.write_bytes(content[:8] + header + content[8 + length :])
    return r"lacks 1 tensor: model\.layers.*; it has, and the map does not know, 1 tensor: madel"


def other_shape(file: Path) -> str:
    content = file.read_bytes()
    assert content.count(b'"shape":[40,48]')
    file.write_bytes(content.replace(b'"shape":[40,48]', b'"shape":[48,40]', 1))
    return r"w1\.weight has shape \[48, 40\], config\.json implies \[40, 48\]$"


DAMAGES = [
    cut_off,
    tear_header,
    empty,
    remove,
    rename_a_tensor,
    other_shape,
    overlap,
    leave_a_gap,
    odd_shape,
    eight_bits,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_not_imported(damage: Any, hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(hub / "hub", folder)
    message = damage(sorted(folder.glob("*.safetensors"))[3])
    with pytest.raises(ValueError, match=message):
        run(["convert", "from-hf", str(folder), str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


def test_a_folder_that_changes_while_it_is_read(hub: Path, tmp_path: Path) -> None:
    """As one that is still being downloaded; the next run takes nothing of the first one's."""
    folder = tmp_path / "hub"
    shutil.copytree(hub / "hub", folder)
    source: Any = open_hub_folder(folder)
    read = source.read

    def change_and_read(unit: WeightPiece) -> Tensor:
        os.utime(folder / "config.json", (0, 0))
        tensor: Tensor = read(unit)
        return tensor

    source.read = change_and_read
    with pytest.raises(ValueError, match=r"hub has changed while it was read: run again, it begins anew$"):
        load_hf(source, tmp_path / "ours", LoadOptions(), Ranks())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "ours.partial"]
    (data,) = (tmp_path / "ours.partial").glob("**/*.distcp")
    before = data.stat().st_mtime_ns
    convert("from-hf", folder, tmp_path / "ours", "--verify")
    assert (tmp_path / "ours" / data.relative_to(tmp_path / "ours.partial")).stat().st_mtime_ns != before


def test_verify_sees_what_a_disk_did(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that changes between writing and reading again."""
    write = exporting._write

    def write_and_flip(plan: Any, folder: Path, shard: Any) -> None:
        write(plan, folder, shard)
        flip(folder / shard.name, (folder / shard.name).stat().st_size - 1)

    monkeypatch.setattr(exporting, "_write", write_and_flip)
    source = open_checkpoint(source_of("to-hf", hub))
    with pytest.raises(ConversionError, match=r"model-00001-of-.* is not what was written: check the disk"):
        export(source, tmp_path / "out", ExportOptions(verify=True), Ranks())
    assert list(tmp_path.iterdir()) == []


def test_verify_sees_what_a_disk_did_between_two_runs(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished file whose header can't be read any more; the next run begins anew."""
    words = ["convert", "to-hf", str(hub / "ours"), str(tmp_path / "out"), "--shard-size", f"{SHARD}"]
    with file_size_limit(45_000):
        assert run(words) == 1
    flip(next((tmp_path / "out.partial").glob("*.safetensors")), 8)
    capsys.readouterr()
    assert run([*words, "--verify"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not what was written: check the disk" in error
    assert list(tmp_path.iterdir()) == []
    assert run([*words, "--verify"]) == 0


def test_verify_sees_what_a_disk_did_to_a_checkpoint(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bit of a tensor in a file that was finished and hashed."""
    words = ["convert", "from-hf", str(hub / "hub"), str(tmp_path / "out"), "--shard-size", f"{SHARD}"]
    obstacle = tmp_path / "out.partial/checkpoints/latest"
    with file_size_limit(45_000):
        assert run(words) == 1
    obstacle.mkdir()
    assert run(words) == 1  # with all data written
    obstacle.rmdir()
    tensor = weights(hub / "hub")["model.norm.weight"].numpy().tobytes()
    files = {file: file.read_bytes() for file in obstacle.parent.glob("*/*.distcp")}
    ((file, at),) = [(file, content.find(tensor)) for file, content in files.items() if tensor in content]
    flip(file, at + 1)
    capsys.readouterr()
    assert run([*words, "--verify"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "decoder.final_layernorm.weight is not what was written: check the disk" in error
    assert list(tmp_path.iterdir()) == []
