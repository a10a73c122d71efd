"""Kills, full disks and wrong input: nothing looks complete that is not, and finished work is kept."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from megatron_m1.cli import run
from megatron_m1.convert.jobs import Job, run_jobs
from megatron_m1.convert.sizes import parse_size
from megatron_m1.convert.work import ConversionError, Ranks, WorkFolder
from megatron_m1.files import file_lock
from tests.checkpoint.checkpoint_runs import file_size_limit
from tests.convert.folders import convert, prints, source_of, weights
from tests.convert.killed import SHARD, start
from tests.reference.transformers_minimax import build

CHECKPOINT = "checkpoints/step_00000000/integrity.json"
DATA = {"to-hf": "*.safetensors", "from-hf": "**/*.distcp"}


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


@pytest.mark.parametrize("link", [False, True])
def test_a_source_in_the_working_folder_is_not_removed(hub: Path, tmp_path: Path, link: bool) -> None:
    """It is what a killed conversion has left, all but its name: good enough to read."""
    partial = tmp_path / "out.partial"
    shutil.copytree(hub / "hub", partial)
    (partial / "conversion.json").write_text("{}")
    source = partial
    if link:
        source = tmp_path / "link"
        source.symlink_to(partial)
    before = {path.name: path.read_bytes() for path in partial.iterdir()}
    with pytest.raises(ValueError, match=rf"^{partial} would be written over, but {source} is read: choose another"):
        run(["convert", "from-hf", str(source), str(tmp_path / "out")])
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == before


def test_somebodys_link_or_lock_in_the_way(hub: Path, tmp_path: Path) -> None:
    words = ["convert", "to-hf", str(hub / "ours"), str(tmp_path / "out")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"out\.partial is there, and not by a conversion"):
        run(words)
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial.lock").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.partial\.lock is there, and no lock of megatron-m1"):
        run(words)
    assert (tmp_path / "out.partial.lock").read_text() == "mine"


def test_no_result_within_a_checkpoint(hub: Path, tmp_path: Path) -> None:
    """It would be removed with the checkpoint."""
    (tmp_path / "link").symlink_to(hub / "ours")
    out = tmp_path / "link/checkpoints/step_00000000/hf"
    with pytest.raises(ValueError, match=r"/hf lies in the checkpoint .* and would go with it: choose another OUT$"):
        run(["convert", "to-hf", str(hub / "ours"), str(out)])


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
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".safetensors", ".json", ".md"}
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


def test_a_full_disk_does_not_wait_for_the_check_of_the_source(tmp_path: Path) -> None:
    """Nor does Ctrl-C: of a large model the check takes many minutes."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    told = []

    def check(over: Event) -> None:
        told.append(over.wait(60))

    with WorkFolder(tmp_path / "out", {}, Ranks()) as work:
        for write, error in ((interrupt, KeyboardInterrupt), (refuse, ConversionError)):
            with pytest.raises(error):
                run_jobs(work, [Job(work.path / "file", 1, write)], Ranks(), title="to-hf", beside=check)
    assert told == [True, True]


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
        (["to-hf", "{}/x", "{}/y"], r"x is no folder: give a checkpoint or a run folder, or hf:FOLDER"),
        (["from-hf", "{}", "{}/y"], r"config\.json can't be read: No such file or directory; give a Hugging Face"),
        (
            ["from-hf", "{hub}/ours", "{}/y"],
            r"ours is a run or a checkpoint, no Hugging Face folder: .* convert to-hf$",
        ),
        (
            ["to-hf", "{hub}/hub", "{}/y"],
            r"hub is a Hugging Face folder, no checkpoint and no run: .* give hf:.*/hub, ",
        ),
        (
            ["from-hf", "org/name", "{}/y"],
            r"nothing is downloaded; fetch it .* hf download org/name --local-dir FOLDER$",
        ),
        (
            [],
            r"^convert needs a direction: .* convert to-hf runs/mid hf/mid writes .* convert from-hf .* imported reads",
        ),
        (["x/runs", "{}/y"], r"^unknown direction x/runs: .* convert to-hf runs/mid hf/mid writes .* convert from-hf "),
        (
            ["to-hf", "{hub}/ours", "{}/y", "--license", "MIT: yes"],
            r"'MIT: yes' is no identifier of a licence on the hub",
        ),
        (["tohf", "{}", "{}/y"], r"^unknown direction tohf: did you mean to-hf\?$"),
        (["to-hf", "{hub}/ours", "{}/y", "--shard-size", "2XB"], r"^shard size '2XB': give a number"),
        (["to-hf", "{hub}/ours", "{}/y", "--remote-code", "{}"], r"has no configuration_minimax_m1\.py: give the"),
        (
            ["to-hf", "{hub}/ours", "{}/y", "--remote-code", "{}", "--format", "native"],
            r"^--remote-code goes with --form",
        ),
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
