"""The records of a run under the names that docs/metrics.md gives them, in its file, TensorBoard and W&B (offline)."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import resolve
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training import tracking
from tests.training import loop_runs as runs

ROOT = Path(__file__).resolve().parents[2]
PEAK_FLOPS = 1e12
WANDB = [
    *[("run.tensorboard", True), ("run.wandb_project", "a project"), ("run.wandb_entity", "a team")],
    *[("run.wandb_name", "a name"), ("run.wandb_group", "a group"), ("run.wandb_tags", ["one", "two"])],
]


def documented() -> dict[str, list[str]]:
    """Names of the tables of docs/metrics.md, by heading."""
    parts = re.split(r"^## (.*)$", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    tables = zip(parts[1::2], parts[2::2], strict=True)
    return {heading: re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) for heading, text in tables}


@pytest.fixture(scope="module")
def folder(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: dict[str, Any]) -> Path:
    """A run of two steps of two ranks on a device whose peak is known, and one more step after a resume."""
    root = tmp_path_factory.mktemp("records")
    path = runs.write_settings(
        root / "1.yaml", tiny_corpus, root / "run", *WANDB, ("run.wandb_mode", "offline"), ("run.wandb_id", "an-id")
    )
    workers.run(runs.train_on_a_known_device, path, PEAK_FLOPS, world_size=2, process_group=False)
    # The name of the W&B run is now the folder's, and the mode that of the environment.
    again = runs.write_settings(root / "2.yaml", tiny_corpus, root / "run", *WANDB, ("train.max_steps", 3))
    workers.run(runs.train_with_variables, again, {"WANDB_MODE": "offline"}, world_size=2, process_group=False)
    return root / "run"


def wandb_records(folder: Path) -> list[Any]:
    """What W&B wrote for later into one run's file: blocks of 32 KiB as LevelDB's log has them, after seven bytes."""
    (path,) = folder.glob("run-*.wandb")
    kind = wandb_internal_pb2.Record  # type: ignore[attr-defined]
    return [kind.FromString(chunk) for chunk in _chunks(path.read_bytes())]


def _chunks(content: bytes) -> Iterator[bytes]:
    place, whole = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_every_name_is_documented_and_every_documented_name_is_written(folder: Path) -> None:
    names = documented()
    steps = [record for record in runs.records(folder) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    without_stages = [name for name in names["A training step"] if name not in ("stage", "aux_loss_coeff")]
    assert list(steps[0]) == list(steps[1]) == without_stages
    # On this CPU itself.
    assert list(steps[2]) == [name for name in without_stages if name != "mfu"]
    validations = [record for record in runs.records(folder) if "loss" not in record]
    assert {tuple(record) for record in validations} == {tuple(names["A validation"])}
    written = {name for record in (*steps, *validations) for name in record}
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == written - {"step"}


def test_the_figures_of_a_step_agree_with_each_other(folder: Path) -> None:
    for record in runs.records(folder)[:2]:
        assert record["mfu"] == pytest.approx(record["model_tflops_per_device"] * 1e12 / PEAK_FLOPS)
        seconds = 256 / record["tokens_per_second"]
        parts = record["forward_backward_seconds"] + record["optimizer_seconds"]
        # The slowest rank's data, which need not be rank 0.
        assert parts <= seconds <= parts + record["data_seconds"] + 1e-6
        assert min(record["forward_backward_seconds"], record["optimizer_seconds"], record["data_seconds"]) > 0
        assert record["memory_peak_gib"] >= record["memory_peak_least_gib"] > 0.1
        assert record["memory_peak_rank"] in (0, 1)
    first, second = runs.records(folder)[:2]
    assert first["save_seconds"] == 0 < second["save_seconds"]
    assert second["memory_peak_gib"] >= first["memory_peak_gib"]


def test_wandb_offline_has_the_run_and_a_resumed_one_goes_on_in_it(folder: Path) -> None:
    first, second = sorted((folder / "wandb").glob("offline-run-*"))
    assert (folder / tracking.RUN_ID).read_text() == "an-id"
    steps = []
    for part in (first, second):
        assert part.name.endswith("-an-id")
        records = wandb_records(part)
        (run,) = [record.run for record in records if record.HasField("run")]
        told = (run.project, run.entity, run.display_name, run.run_group, list(run.tags), run.run_id)
        assert told == ("a project", "a team", "a name", "a group", ["one", "two"], "an-id")
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["optimizer"]["lr"] == runs.SETTINGS["optimizer"]["lr"]
        for record in records:
            if record.HasField("history"):
                items = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                steps += [items["step"]] if "loss" in items else []
                assert {name for name in items if not name.startswith("_")} <= {
                    name for names in documented().values() for name in names
                }
    assert steps == [1, 2, 3]


def test_what_wandb_refuses_is_one_line(tmp_path: Path) -> None:
    config = parse_config([], ["--run.wandb_project", "p", "--run.wandb_mode", "offline", "--run.wandb_id", "a/b"])
    with pytest.raises(ValueError, match=r"^run.wandb_project = 'p': W&B refuses: .*: put that right, or") as refused:
        tracking.Tracker(tmp_path, config.run, {})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / tracking.RUN_ID).exists()


def test_wandb_is_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"run.wandb_name = 'n' without run.wandb_project: give the project"):
        resolve(parse_config([], ["--run.wandb_name", "n"]), 1, has_gpu=False)
    config = parse_config([], ["--run.wandb_project", "p"])
    resolve(config, 1, has_gpu=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"wandb_project = 'p', but the wandb package.*pip install 'megatron-m1\[wandb\]'"
    ):
        resolve(config, 1, has_gpu=False)
