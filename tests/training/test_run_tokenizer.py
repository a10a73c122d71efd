"""The run's own copy of its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_m1.config import Config
from megatron_m1.training.run_folder import check_run_folder
from megatron_m1.training.run_tokenizer import is_copy, own_copy, store_tokenizer


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def store(tokenizer: Path, folder: Path, step: int = 0) -> list[str]:
    notes: list[str] = []
    folder.mkdir(exist_ok=True)
    store_tokenizer(tokenizer, folder, step=step, note=notes.append)
    return notes


def test_a_sentencepiece_model_is_copied_once(tmp_path: Path) -> None:
    model, run = tmp_path / "web.model", tmp_path / "run"
    model.write_bytes(b"pieces")
    assert store(model, run) == []
    assert content(run) == {"tokenizer/web.model": b"pieces"}
    assert own_copy(model, run) == run / "tokenizer" / "web.model"
    time = (run / "tokenizer").stat().st_mtime_ns
    assert store(model, run) == []
    assert (run / "tokenizer").stat().st_mtime_ns == time


def test_of_a_hugging_face_folder_only_what_belongs_to_a_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "hub"
    (source / "chat_templates").mkdir(parents=True)
    taken = (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_templates/tool.jinja",
        "generation_config.json",
        "LICENSE",
    )
    for name in (*taken, "config.json", "model.safetensors", "pytorch_model.bin", "README.md"):
        (source / name).write_bytes(name.encode())
    store(source, tmp_path / "run")
    assert content(tmp_path / "run") == {f"tokenizer/{name}": name.encode() for name in taken}
    assert own_copy(source, tmp_path / "run") == tmp_path / "run" / "tokenizer"
    # Without tokenizer.json, config.json may name the tokenizer's class.
    (source / "tokenizer.json").rename(source / "vocab.json")
    assert len(store(source, tmp_path / "run", 5)) == 1
    assert {"vocab.json", "config.json"} <= set(content(tmp_path / "run" / "tokenizer"))


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json"])
def test_another_tokenizer_takes_its_place_and_the_former_stays(tmp_path: Path, name: str) -> None:
    source, run = tmp_path / "hub", tmp_path / "run"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(b"old")
    store(source, run)
    (source / name).write_bytes(b"new")
    assert not is_copy(run / "tokenizer", source)
    for kept in ("tokenizer.until_step_00000007", "tokenizer.until_step_00000007.2"):
        before = content(run / "tokenizer")
        (source / name).write_bytes(kept.encode())
        notes = store(source, run, 7)
        assert notes == [
            f"data.tokenizer is another one than the run's: {run}/tokenizer is its copy now, the former is {run}/{kept}"
        ]
        assert content(run / kept) == before and content(run / "tokenizer") == content(source)


def test_one_that_lies_in_its_place_is_left_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "tokenizer").mkdir(parents=True)
    (run / "tokenizer" / "web.model").write_bytes(b"pieces")
    for tokenizer in (run / "tokenizer", run / "tokenizer" / "web.model"):
        config = Config()
        config.run.folder, config.data.tokenizer = str(run), str(tokenizer)
        check_run_folder(config)
        assert store(tokenizer, run) == [] and own_copy(tokenizer, run) == tokenizer
    assert content(run) == {"tokenizer/web.model": b"pieces"}
    config.data.tokenizer = str(tmp_path / "other.model")
    with pytest.raises(ValueError, match=r"run has a tokenizer that no run has written: move it"):
        check_run_folder(config)


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    """Nor does a kill, once there is another start."""
    run = tmp_path / "run"
    (run / ".tokenizer.1.partial").mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        store(tmp_path / "gone.model", run)
    assert list(run.iterdir()) == []
