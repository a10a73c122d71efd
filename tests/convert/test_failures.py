"""Kills, full disks and damaged files: nothing looks complete that is not, and finished work is kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_m1.cli import run
from megatron_m1.convert import export as exporting
from megatron_m1.convert.export import ExportOptions, export
from megatron_m1.convert.our_checkpoint import open_checkpoint
from megatron_m1.convert.work import ConversionError, Ranks, parse_size
from megatron_m1.data.files import file_lock
from tests.convert.folders import convert, prints, weights
from tests.convert.killed import SHARD, start
from tests.reference.transformers_minimax import build
from tests.training.checkpoint_runs import file_size_limit

CHECKPOINT = "checkpoints/step_00000000/integrity.json"
DATA = {"to-hf": "*.safetensors", "from-hf": "**/*.distcp"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder of several shards."""
    root = tmp_path_factory.mktemp("hub")
    shape: dict[str, Any] = dict(layers=8, hidden=48, heads=4, kv_heads=2, head_dim=24, ffn=40, experts=5)
    model = build(**shape, vocab=99, rotary_dim=24, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=9)
    model.save_pretrained(root / "native")
    convert("from-hf", root / "native", root / "ours")
    convert("to-hf", root / "ours", root / "hub", "--shard-size", f"{SHARD}")
    return root


def source_of(direction: str, hub: Path) -> Path:
    return hub / ("ours/checkpoints/step_00000000" if direction == "to-hf" else "hub")


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_killed_conversion_goes_on(direction: str, hub: Path, tmp_path: Path) -> None:
    source, out = source_of(direction, hub), tmp_path / "out"
    # A process of its own: a forkserver started here would lack what the pool's workers need.
    command = [sys.executable, "-m", "tests.convert.killed", direction, str(source), str(out), "3"]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], timeout=120).returncode == -signal.SIGKILL
    assert not out.exists()
    partial = tmp_path / "out.partial"
    done = {path.name.removesuffix(".json") for path in (partial / "journal").iterdir()}
    assert len(done) >= 3
    before = {path.name: path.stat() for path in partial.glob(DATA[direction]) if path.name in done}
    start(direction, source, out)
    after = {path.name: path.stat() for path in out.glob(DATA[direction])}
    assert len(after) > len(before) >= 3
    for name, stat in before.items():
        assert (after[name].st_ino, after[name].st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), "not written again"
    start(direction, source, tmp_path / "straight")
    for path in (tmp_path / "straight").glob(DATA[direction]):
        assert (out / path.relative_to(tmp_path / "straight")).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]
    if direction == "from-hf":
        convert("to-hf", out, tmp_path / "again", "--shard-size", f"{SHARD}")
        assert prints(weights(tmp_path / "again")) == prints(weights(hub / "hub"))


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_full_disk(direction: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on file sizes stands for the disk. What fitted is kept, and the same command goes on with it."""
    source, out = source_of(direction, hub), tmp_path / "out"
    words = ["convert", direction, str(source), str(out), "--shard-size", f"{SHARD}"]
    with file_size_limit(45_000):
        assert run(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"megatron-m1: error: {out}.partial can't be written: ")
    assert "File too large" in error and error.endswith("make room and run again, it goes on from there\n")
    assert not out.exists()
    assert run(words) == 0
    assert not (tmp_path / "out.partial").exists()
    if direction == "to-hf":
        assert prints(weights(out)) == prints(weights(hub / "hub"))


@pytest.mark.parametrize(
    ("direction", "name"), [("to-hf", "config.json"), ("from-hf", "checkpoints/latest"), ("from-hf", CHECKPOINT)]
)
def test_a_conversion_that_fails_at_the_end_goes_on(direction: str, name: str, hub: Path, tmp_path: Path) -> None:
    """A folder where a file belongs stands for a disk that is full when all weights are written."""
    source, out = source_of(direction, hub), tmp_path / "out"
    words = ["convert", direction, str(source), str(out), "--shard-size", f"{SHARD}"]
    with file_size_limit(45_000):
        assert run(words) == 1
    partial = tmp_path / "out.partial"
    (partial / name).mkdir(parents=True)
    assert run(words) == 1
    (partial / ".config.json.1.partial").write_bytes(b"torn")
    data = {path: path.stat().st_mtime_ns for path in partial.glob(DATA[direction])}
    assert data and not out.exists()
    (partial / name).rmdir()
    assert run(words) == 0
    assert {partial / path.relative_to(out): path.stat().st_mtime_ns for path in out.glob(DATA[direction])} == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not {"journal", "conversion.json", ".config.json.1.partial"} & {path.name for path in out.iterdir()}


def test_two_at_a_time_are_refused(hub: Path, tmp_path: Path) -> None:
    with file_lock(tmp_path / "out.partial.lock", wait=False):
        for direction in ("to-hf", "from-hf"):
            with pytest.raises(ValueError, match=rf"^another process is writing {tmp_path}/out\.partial: wait for it"):
                run(["convert", direction, str(source_of(direction, hub)), str(tmp_path / "out")])
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial.lock"]


def test_a_folder_of_the_working_folders_name_is_not_touched(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.partial is there, and not by a conversion: move it, or choose another"):
        run(["convert", "to-hf", str(hub / "ours"), str(tmp_path / "out")])
    assert (tmp_path / "out.partial/thesis.txt").read_text() == "mine"


def test_what_an_earlier_end_wrote_is_removed(hub: Path, tmp_path: Path) -> None:
    """Another tokenizer, or none, does not mix with that of an attempt that failed at its last file."""
    words = ["convert", "to-hf", str(hub / "ours"), str(tmp_path / "out")]
    index = tmp_path / "out.partial/model.safetensors.index.json"
    with file_size_limit(45_000):
        assert run(words) == 1
    index.mkdir()
    (tmp_path / "out.partial/tokenizer.json").write_text("{}")
    assert run(words) == 1
    index.rmdir()
    assert run(words) == 0
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".safetensors", ".json"}
    assert not (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
@pytest.mark.parametrize("change", ["shorter", "source"])
def test_what_is_not_as_it_was_is_written_again(direction: str, change: str, hub: Path, tmp_path: Path) -> None:
    source, out = tmp_path / source_of(direction, hub).name, tmp_path / "out"
    shutil.copytree(source_of(direction, hub), source)
    words = ["convert", direction, str(source), str(out), "--shard-size", f"{SHARD}"]
    with file_size_limit(45_000):
        assert run(words) == 1
    partial = tmp_path / "out.partial"
    obstacle = partial / ("config.json" if direction == "to-hf" else "checkpoints/latest")
    obstacle.mkdir(parents=True)
    assert run(words) == 1  # with all data written
    obstacle.rmdir()
    files = sorted(partial.glob(DATA[direction]))
    if change == "shorter":
        os.truncate(files[0], files[0].stat().st_size - 4)
    else:
        os.utime(next(path for path in source.iterdir() if path.suffix == ".json"), (0, 0))
    before = {path.name: path.stat().st_mtime_ns for path in files}
    assert run([*words, "--verify"]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob(DATA[direction])}
    written = {name for name, time in before.items() if after[name] != time}
    assert written == ({files[0].name} if change == "shorter" else set(before))


def test_a_full_disk_in_the_middle_of_a_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape: dict[str, Any] = dict(layers=8, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=8, experts=2)
    model = build(**shape, vocab=20_000, rotary_dim=8, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=9)
    model.save_pretrained(tmp_path / "native")
    capsys.readouterr()
    with file_size_limit(500_000):
        assert run(["convert", "from-hf", str(tmp_path / "native"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out.partial can't be written: File too large; make room" in error


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
    return r"lacks 1 tensors: model\.layers.*; it has, and the map does not know, 1 tensors: madel"


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


def test_numbers_that_fp16_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape: dict[str, Any] = dict(layers=8, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=8, experts=2)
    model = build(**shape, vocab=20, rotary_dim=8, rope_theta=1e4, softmax_every=8, alpha=2.0, seed=9)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 7e4
    model.save_pretrained(tmp_path / "native")
    convert("from-hf", tmp_path / "native", tmp_path / "ours")
    for words in (["from-hf", "native", "low"], ["to-hf", "ours", "low"]):
        paths = [str(tmp_path / word) for word in words[1:]]
        assert run(["convert", words[0], *paths, "--dtype", "fp16"]) == 1
        assert "output_layer.weight has numbers beyond 65504, the largest of fp16" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "ours"]


def test_verify_asked_for_later_keeps_what_is_there(hub: Path, tmp_path: Path) -> None:
    words = ["convert", "to-hf", str(hub / "ours"), str(tmp_path / "out"), "--shard-size", f"{SHARD}"]
    with file_size_limit(45_000):
        assert run(words) == 1
    done = {path.name: path.stat().st_ino for path in (tmp_path / "out.partial").glob("*.safetensors")}
    recorded = {path.name.removesuffix(".json") for path in (tmp_path / "out.partial/journal").iterdir()}
    assert recorded and recorded == done.keys()
    assert run([*words, "--verify"]) == 0
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in done} == done


def test_an_old_partial_of_another_conversion_is_begun_anew(hub: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".conversion.json.1.partial").write_text("{")  # a first one died even earlier
    with file_size_limit(45_000):
        assert run(["convert", "to-hf", str(hub / "ours"), str(tmp_path / "out")]) == 1
    (partial / "conversion.json").write_text("{}")
    (partial / "stray.safetensors").write_bytes(b"x")
    convert("to-hf", hub / "ours", tmp_path / "out", "--shard-size", f"{SHARD}")
    assert prints(weights(tmp_path / "out")) == prints(weights(hub / "hub"))


def test_an_existing_folder_is_not_touched(hub: Path, tmp_path: Path) -> None:
    for direction in ("to-hf", "from-hf"):
        with pytest.raises(ValueError, match=rf"^{tmp_path} exists: choose another folder, or remove it$"):
            run(["convert", direction, str(source_of(direction, hub)), str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to-hf", "{}/x", "{}/y"], r"x is no folder: give a checkpoint or a run folder$"),
        (["from-hf", "{}", "{}/y"], r"config\.json can't be read: No such file or directory; give a Hugging Face"),
        ([], r"^convert needs a direction: to-hf or from-hf$"),
        (["tohf", "{}", "{}/y"], r"^unknown direction tohf: did you mean to-hf\?$"),
        (["to-hf", "{hub}/ours", "{}/y", "--shard-size", "2XB"], r"^shard size '2XB': give a number"),
        (["to-hf", "{hub}/ours", "{}/y", "--remote-code", "{}"], r"has no configuration_minimax_m1\.py: give the"),
        (["to-hf", "{hub}/ours", "{}/y", "--tokenizer", "{}/t"], r"^tokenizer .*/t can't be read: "),
        (["to-hf", "{hub}/ours", "{}/y", "--tokenizer", "{}/t", "--dry-run"], r"^tokenizer .*/t can't be read: "),
        (["to-hf", "{hub}/ours", "{}", "--dry-run"], r" exists: choose another folder, or remove it$"),
        (["from-hf", "{hub}/hub", "{}", "--dry-run"], r" exists: choose another folder, or remove it$"),
        (["from-hf", "{hub}/hub", "{hub}/hub/config.json/y"], r"y can't be made: .*/config\.json: File exists; choose"),
        (["from-hf", "{hub}/hub", "."], r"^\. exists: choose another folder, or remove it$"),
    ],
)
def test_wrong_input(words: list[str], message: str, hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(["convert", *(word.format(tmp_path, hub=hub) for word in words)])
    assert list(tmp_path.iterdir()) == []


def test_sizes() -> None:
    sizes = {"7": 7, "2GB": 2 * 10**9, "3MiB": 3 << 20, "5kb": 5000, "1.5GB": 1_500_000_000, "1TiB": 1 << 40}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "0", "-1", "1.5.1GB", "GB", "1TB1", "\uff15GB", "1GGB", "0.1"):
        with pytest.raises(ValueError, match=r"^shard size "):
            parse_size(text)
