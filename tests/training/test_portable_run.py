"""A run from its first line to the commands that it ends with, then moved, without its tokenizer's original."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_m1.checkpoint.folder import file_digests
from megatron_m1.config.written import CONFIG, RESOLVED, yaml_text
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.runtime.pool import WorkerPool
from tests.training import loop_runs as runs

pytestmark = pytest.mark.slow


class Shell:
    """The console command on one worker process."""

    def __init__(self, workers: WorkerPool) -> None:
        self._workers = workers

    def __call__(self, folder: Path, *words: object, ranks: int = 1) -> str:
        """Run it in a directory; what rank 0 prints. The other ranks say nothing, and all end with 0."""
        texts = [str(word) for word in words]
        said = self._workers.run(runs.command, texts, folder, world_size=ranks, process_group=False)
        assert [status for status, _ in said] == [0] * ranks
        assert [text for _, text in said[1:]] == [""] * (ranks - 1)
        return said[0][1]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: dict[str, Any]) -> Path:
    """A directory with a tokenizer and the YAML of a run of three steps, whose paths are relative to it."""
    work = tmp_path_factory.mktemp("work")
    shutil.copy(tiny_corpus["tokenizer"], work / "t.model")
    corpus = tiny_corpus | {"tokenizer": "t.model"}
    changes = [("train.max_steps", 3), ("run.tensorboard", True), ("optimizer.lr_decay_tokens", 256)]
    runs.write_settings(work / "run.yaml", corpus, Path("runs/a"), *changes)
    return work


@pytest.fixture(scope="module")
def log(work: Path, workers: WorkerPool) -> str:
    """What the run of ``work`` has printed; it is in ``work/runs/a``."""
    return Shell(workers)(work, "pretrain", "--config", "run.yaml", ranks=2)


def test_the_log_begins_with_what_runs(log: str) -> None:
    lines = log.splitlines()
    opening = lines[: next(at for at, line in enumerate(lines) if line.startswith("step "))]
    assert max(map(len, opening)) <= 80
    labels = [line[:12].strip() for line in opening if line[:12].strip()]
    assert labels == ["versions", "mesh", "experts", "devices", "model", "data", "batch", "steps", "lr", "folder"]
    text = " ".join(" ".join(opening).split())
    for fact in (
        r"versions megatron-m1 [\d.]+, megatron-core 0\.19\.\d+, torch \S+, python 3\.\d+\.\d+ ",
        r"mesh tensor 1 x context 1 x pipeline 1 x data 2 = 2 ",
        r"devices 2 x cpu over gloo, fp32, local modules ",
        r"model 4 layers, [\d,]+ parameters, [\d,]+ active per token ",
        r"data 100\.0% \S+/train: [\d,]+ tokens, read 0\.\d\d times ",
        r"batch 4 packs of 64 tokens = 256 tokens a step, 2 micro-batches a rank ",
        r"steps 3 = 768 tokens ",
        r"lr peak 0\.003, 512 tokens of warm-up, cosine decay over 256 to 2e-05 ",
        r"folder runs/a$",
    ):
        assert re.search(fact, text), fact


def test_the_log_ends_with_where_to_look(log: str, work: Path) -> None:
    facts = dict(line.split(maxsplit=1) for line in log.splitlines()[-4:])
    assert list(facts) == ["tensorboard", "metrics", "checkpoint", "generate"]
    assert facts["tensorboard"].endswith("tensorboard --logdir runs/a/tensorboard")
    assert facts["metrics"] == "runs/a/metrics.jsonl" and (work / facts["metrics"]).is_file()
    assert facts["checkpoint"] == "runs/a/checkpoints/step_00000003" and (work / facts["checkpoint"]).is_dir()
    # That very line, in a shell.
    done = subprocess.run(facts["generate"], shell=True, cwd=work, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("The")


def test_the_files_say_what_was_asked(log: str, work: Path) -> None:
    run = work / "runs" / "a"
    assert json.loads((run / "summary.json").read_text())["run_folder"] == str(run)
    for place in (run, run / "checkpoints" / "step_00000003"):
        asked, became = (yaml.safe_load((place / name).read_text()) for name in (CONFIG, RESOLVED))
        assert (asked["train"]["precision"], became["train"]["precision"]) == ("auto", "fp32")
        assert (asked["parallel"]["distributed_backend"], became["parallel"]["distributed_backend"]) == ("auto", "gloo")
        assert (asked["data"]["cache_folder"], became["data"]["cache_folder"]) == (None, "data_cache")
        assert asked["data"]["tokenizer"] == str(work / "t.model")
        assert became["data"]["tokenizer"] == "tokenizer/t.model"
        assert (asked["run"]["folder"], became["run"]["folder"]) == (".", str(run))
    assert file_digests(run / "tokenizer", ["t.model"]) == file_digests(work, ["t.model"])


def test_a_dry_run_says_where_weights_come_from(
    log: str, work: Path, workers: WorkerPool, tiny_corpus: dict[str, Any]
) -> None:
    shell = Shell(workers)
    flags = ["pretrain", "--config", "run.yaml", "--dry-run", "--init-from", "runs/a"]
    plan = shell(work, *flags, "--run.folder", "runs/new")
    assert "init_from   weights of runs/a/checkpoints/step_00000003\n" in plan
    plan = shell(work, *flags, "--train.max_steps", 4)
    assert "run folder  runs/a, goes on from step_00000003\ninit_from   runs/a is not read: the run has " in plan
    assert f"changed     run.init_from None -> {work}/runs/a, which is not read again\n" in plan
    # Nothing else: what the file says is what was asked.
    assert plan.endswith("again\ndry run: nothing was started\n")
    # Without a file, the packs are as long as those that the weights were trained on.
    data = ["--data.train", ",".join(tiny_corpus["train"]), "--data.tokenizer", "t.model"]
    plan = shell(work, "pretrain", "--init-from", "runs/a", "--run.folder", "runs/new", "--dry-run", *data)
    assert "batch       8 packs of 64 tokens = " in plan


def test_its_files_are_configurations_for_other_runs(log: str, work: Path, workers: WorkerPool, tmp_path: Path) -> None:
    """Read from any directory: paths are of the run's folder; and over whatever files come before."""
    shell, run = Shell(workers), work / "runs" / "a"
    (tmp_path / "more.yaml").write_text("train: {global_batch_size: 2, max_steps: 9}")
    shutil.copytree(run, tmp_path / "b")
    for file in (Path("b/config.yaml"), Path("b/checkpoints/step_00000003/config.yaml"), Path("b/resolved.yaml")):
        before, after = ("--config", "more.yaml", "--config", file), ("--train.max_steps", 5)
        plan = shell(tmp_path, "pretrain", *before, *after, "--dry-run")
        assert re.search(r"run folder  \S*b, goes on from step_00000003\ndry run: nothing", plan)
        plan = shell(tmp_path, "pretrain", *before, "--config", "more.yaml", "--run.folder", "new", "--dry-run")
        assert "steps       9 = 1,152 tokens" in plan and "run folder  new\n" in plan


def test_the_script_goes_on_with_it_too(log: str, work: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "pretrain_m1.sh"
    words = ["bash", str(script), "--run.folder", "runs/a", "--train.max_steps", "5", "--dry-run", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("runs/a goes on with its own configuration, runs/a/config.yaml, and")
    assert "model       4 layers" in done.stdout


def as_of_an_older_version(run: Path) -> None:
    """Leave of a run what older versions kept: what was derived, with paths from the directory of the call."""
    checkpoint = run / "checkpoints" / "step_00000003"
    for place in (run, checkpoint):
        tree = yaml.safe_load((place / RESOLVED).read_text())
        tree["run"]["folder"], tree["data"]["cache_folder"] = "runs/a", "runs/a/data_cache"
        tree["data"]["tokenizer"] = "t.model"
        (place / CONFIG).write_text(yaml_text(tree))
        (place / RESOLVED).unlink()
    shutil.rmtree(run / "tokenizer")
    names = [path.name for path in checkpoint.iterdir() if path.name != "integrity.json"]
    manifest = {"algorithm": "sha256", "files": file_digests(checkpoint, names)}
    (checkpoint / "integrity.json").write_text(json.dumps(manifest))


def test_a_run_of_an_older_version_goes_on(log: str, work: Path, workers: WorkerPool, tmp_path: Path) -> None:
    shell, run = Shell(workers), tmp_path / "runs" / "a"
    shutil.copytree(work / "runs" / "a", run)
    shutil.copy(work / "t.model", tmp_path)
    as_of_an_older_version(run)
    words = ["--prompt", "def ", "--max-tokens", 4]
    # From the folder's own path it follows where its command was called.
    assert shell(work, "generate", run, *words) == shell(work, "generate", "runs/a", *words)
    # The file that it was started with, and its own.
    shutil.copytree(run, tmp_path / "own")
    yaml_of_run = work / "run.yaml"
    said = shell(tmp_path, "pretrain", "--config", yaml_of_run, "--train.max_steps", 4)
    assert "resumed from step 3 (768 tokens)\n" in said and "changed" not in said
    assert (run / "tokenizer" / "t.model").is_file() and (run / RESOLVED).is_file()
    said = shell(tmp_path, "pretrain", "--run.folder", "own", "--train.max_steps", 4)
    assert "resumed from step 3 (768 tokens)\n" in said and "changed" not in said
    traces = [runs.trace(folder)[-1] for folder in (run, tmp_path / "own")]
    assert traces[0] == traces[1]
    # What it became was all that it had.
    assert yaml.safe_load((tmp_path / "own" / CONFIG).read_text())["train"]["precision"] == "fp32"


def test_moved_and_without_its_tokenizer_it_goes_on_from_anywhere(
    log: str, work: Path, workers: WorkerPool, tmp_path: Path
) -> None:
    shell, moved, words = Shell(workers), tmp_path / "elsewhere" / "b", ["--prompt", "def ", "--max-tokens", 4]
    shutil.copytree(work / "runs" / "a", moved)
    before = shell(work, "generate", "runs/a", *words)
    original = work / "t.model"
    hidden = original.rename(work / "hidden.model")
    try:
        for place in (moved, moved / "checkpoints" / "step_00000003"):
            assert shell(tmp_path, "generate", place, *words) == before
            assert f"tokenizer {moved}/tokenizer/t.model\n" in shell(tmp_path, "inspect", place)
        assert shell(moved.parent, "generate", "b", *words) == before
        shell(tmp_path, "convert", "to-hf", moved, "hub")
        text = "def convert(path):\n"
        assert load_tokenizer(tmp_path / "hub").encode(text) == load_tokenizer(hidden).encode(text)

        plan = shell(tmp_path, "pretrain", "--run.folder", "elsewhere/b", "--train.max_steps", 5, "--dry-run")
        assert "run folder  elsewhere/b, goes on from step_00000003\n" in plan and "changed" not in plan
        assert not (moved / ".tokenizer").exists()
        said = shell(tmp_path, "pretrain", "--run.folder", "elsewhere/b", "--train.max_steps", 5)
    finally:
        hidden.rename(original)
    plan = shell(
        work, "pretrain", "--config=run.yaml", "--init-from", f"hf:{tmp_path}/hub", "--run.folder=runs/b", "--dry-run"
    )
    assert f"init_from   weights of hf:{tmp_path}/hub, which is converted to runs/b/initial first\n" in plan
    lines = said.splitlines()
    assert lines[:2] == [
        "elsewhere/b goes on with its own configuration, elsewhere/b/config.yaml, and what the flags change in it",
        f"note: data.tokenizer = {original} is not there: the run's own copy is read, elsewhere/b/tokenizer/t.model",
    ]
    assert "            min_lr from step 4 on: the schedule ends at 768 tokens" in lines
    assert "resumed from step 3 (768 tokens)" in lines and "changed since" not in said
    assert [line["step"] for line in runs.records(moved) if "loss" in line] == [1, 2, 3, 4, 5]
    asked = yaml.safe_load((moved / CONFIG).read_text())
    assert (asked["train"]["max_steps"], asked["train"]["precision"]) == (5, "auto")
    assert asked["data"]["tokenizer"] == str(original)
    assert not list(moved.parent.rglob("*.until_*")) and sorted(tmp_path.iterdir()) == [moved.parent, tmp_path / "hub"]
