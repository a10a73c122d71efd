"""What a run's files say of its configuration, and where their paths lead after a move."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from megatron_m1.config import Config
from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import resolve
from megatron_m1.config.written import CONFIG, RESOLVED, config_text, read_saved, saved_texts


def save(config: Config, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in saved_texts(config, folder).items():
        (folder / name).write_text(text)


def asked(*flags: str) -> Config:
    return parse_config([], list(flags))


def test_what_was_asked_stays_open_and_what_it_became_stands_beside_it(tmp_path: Path) -> None:
    """A file of a CPU's run, used on GPUs."""
    given = asked(f"--run.folder={tmp_path}/run", "--parallel.tensor_model_parallel_size=2")
    save(resolve(given, 2, has_gpu=False), tmp_path / "run")
    saved = read_saved(tmp_path / "run", tmp_path / "run")
    assert saved.asked == given
    assert (saved.became.parallel.distributed_backend, saved.became.train.precision) == ("gloo", "fp32")
    assert saved.became.data.cache_folder == f"{tmp_path}/run/data_cache"
    again = resolve(parse_config([tmp_path / "run" / CONFIG], ["--model.transformer_impl=local"]), 2, has_gpu=True)
    assert (again.parallel.distributed_backend, again.train.precision) == ("nccl", "bf16")


def test_paths_are_absolute_or_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory in which the command was called plays no part."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = asked(
        "--run.folder=../runs/a/",
        "--data.train=[0.5, corpora/web, 0.5, ../runs/a/own]",
        "--data.tokenizer=../runs/a/tokenizer/x.model",
        "--run.init_from=hf:hub",
        "--data.cache_folder=/cache",
    )
    save(given, Path("../runs/a"))
    written = yaml.safe_load((tmp_path / "runs" / "a" / CONFIG).read_text())
    assert (written["run"]["folder"], written["run"]["init_from"]) == (".", f"hf:{tmp_path}/here/hub")
    assert (written["data"]["tokenizer"], written["data"]["cache_folder"]) == ("tokenizer/x.model", "/cache")
    assert written["data"]["train"] == ["0.5", f"{tmp_path}/here/corpora/web", "0.5", "own"]
    os.rename(tmp_path / "runs" / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    for folder in (Path("b"), tmp_path / "b"):
        found = read_saved(folder, folder).asked
        assert found.run.folder == str(folder)
        assert found.data.train == ["0.5", f"{tmp_path}/here/corpora/web", "0.5", str(folder / "own")]
        assert found.data.tokenizer == str(folder / "tokenizer/x.model")
        assert (found.run.init_from, found.data.cache_folder) == (f"hf:{tmp_path}/here/hub", "/cache")


def test_a_folder_by_its_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    given = asked(f"--run.folder={tmp_path}/run", f"--data.cache_folder={tmp_path}/disk/run/cache")
    assert "cache_folder: cache" in saved_texts(given, tmp_path / "run")[CONFIG]


def test_a_checkout_that_moves_with_its_corpora(tmp_path: Path) -> None:
    """What is not where it was, and stood beside the run, is looked for there; what is still there is taken."""
    (tmp_path / "co" / "corpora").mkdir(parents=True)
    for name in ("web.bin", "code.bin"):
        (tmp_path / "co" / "corpora" / name).touch()
    (tmp_path / "stays.bin").touch()
    run, blend = tmp_path / "co" / "runs" / "a", ["co/corpora/web", "co/corpora/gone", "stays"]
    given = asked(f"--run.folder={run}", f"--data.train={','.join(f'{tmp_path}/{name}' for name in blend)}")
    save(resolve(given, 1, has_gpu=False), run)
    os.rename(tmp_path / "co", tmp_path / "new")
    run = tmp_path / "new" / "runs" / "a"
    found = read_saved(run, run)
    expected = [f"{tmp_path}/{name}" for name in ("new/corpora/web", "co/corpora/gone", "stays")]
    assert found.asked.data.train == found.became.data.train == expected


@pytest.mark.parametrize(
    ("name", "is_inferred"), [("runs/a", True), ("runs/former", True), ("former", False), ("{}", False)]
)
def test_files_of_older_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_inferred: bool) -> None:
    """They have only what was derived, with paths from the directory of the call: the run's folder may tell which."""
    folder = tmp_path / "place" / "runs" / "a"
    folder.mkdir(parents=True)
    resolved = resolve(asked(f"--run.folder={name.format(folder)}", "--data.tokenizer=t.model"), 1, has_gpu=False)
    (folder / CONFIG).write_text(config_text(resolved))
    monkeypatch.chdir(tmp_path)
    saved = read_saved(folder, folder)
    assert saved.asked == saved.became
    assert saved.asked.train.precision == "fp32"
    assert saved.asked.run.folder == str(folder)
    assert saved.asked.data.tokenizer == (f"{tmp_path}/place/t.model" if is_inferred else "t.model")
    assert not (folder / RESOLVED).exists()
