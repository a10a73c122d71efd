"""``pretrain`` with stages: the plan as a table, the recipes of the examples, and what is refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_m1.commands.stage_table import stage_table
from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import resolve_stages
from megatron_m1.config.schedules import course
from tests.test_cli import CONFIGS, Run, assert_refused, command, corpus, tokenizer  # noqa: F401

STAGES = """\
data: {{seq_length: 8, train: [{corpus}], tokenizer: {tokenizer}}}
run: {{folder: {folder}}}
train: {{global_batch_size_schedule: [0, 2, 100, 4], eval_samples: 2}}
stages:
  - {{name: short, tokens: 200}}
  - name: long
    tokens: 400
    data: {{seq_length: 16, train: [0.25, {more}, 0.75, {corpus}]}}
    optimizer: {{lr_segments: [linear, 400, 1.0e-5]}}
    parallel: {{context_parallel_size: 2}}
"""


@pytest.fixture
def recipe(corpus: Path, tokenizer: Path) -> Path:  # noqa: F811
    """A run of two stages on two corpora."""
    more = corpus.parent / "more"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", f"{more}{suffix}")
    # Another one, by one token.
    content = bytearray(Path(f"{more}.bin").read_bytes())
    content[0] = 9
    Path(f"{more}.bin").write_bytes(content)
    file = corpus.parent / "recipe.yaml"
    file.write_text(STAGES.format(corpus=corpus, more=more, tokenizer=tokenizer, folder=corpus.parent / "run"))
    return file


def test_the_plan_has_a_table_of_stages(
    command: Run,  # noqa: F811
    recipe: Path,
    corpus: Path,  # noqa: F811
) -> None:
    status, out, err = command("pretrain", "--dry-run", "--config", recipe)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "stage       short, 1 of 2, to step 10 = 208 tokens" in lines
    at = next(number for number, line in enumerate(lines) if line.startswith("stage  tokens"))
    cells = [[cell for cell in line.split("  ") if cell] for line in lines[at : at + 3]]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["stage", "tokens", "steps", "length", "packs a step", "lr", "mesh", "blend"],
        ["short", "208", "1-10", "8", "2 to 4", "0.0002", "dp on 1 process", "corpus"],
        ["long", "448", "11-17", "16", "4", "0.0002 to 1e-05", "cp2 on 2 processes", "25% more, 75% corpus"],
    ]
    assert "steps       17 = 656 tokens" in lines
    assert lines[-1] == "dry run: nothing was started"
    assert not (corpus.parent / "run").exists()


def test_the_table_folds_by_whole_cells(recipe: Path) -> None:
    config = parse_config([recipe], [])
    lines = stage_table(resolve_stages(config, 1, has_gpu=False), 1, course(config), 50)
    assert max(map(len, lines)) <= 50
    assert len(lines) == 9 and [line.split()[0] for line in lines[::3]] == ["stage", "short", "long"]


def test_data_of_all_stages_are_checked_before_the_first_starts(
    command: Run,  # noqa: F811
    recipe: Path,
    corpus: Path,  # noqa: F811
) -> None:
    train = ["pretrain", "--config", recipe]
    missing = ["--stages.long.data.train", f"[0.5, {corpus}, 0.5, {corpus.parent}/nowhere]"]
    for words in ([*train, "--dry-run"], train):
        assert_refused(command(*words, *missing), "stage long: data.train: ", "nowhere.bin does not exist")
        caps = ["--stages.long.data.max_epochs", 3]
        assert_refused(command(*words, *caps), "stage long: data.max_epochs lets data.train give ", "of 400 tokens")
        assert_refused(command(*words, "--stages.long.optimizer.lr", 1e-3), "begins with the learning rate 0.001")
        assert_refused(command(*words, "--stages.long.parallel.context_parallel_size", 16), "at most 8")
        assert_refused(command(*words, "--stages.long.tokens", 0), "stage long: tokens = ", "above 0")
    # Nothing but what was found in the corpora.
    assert {path.name for path in (corpus.parent / "run").iterdir()} == {"data_cache"}


@pytest.mark.parametrize(
    ("name", "stages", "tokens"),
    [
        ("text-01-pretrain", 1, 11.4e12),
        ("m1-continued-pretrain", 2, 7.5e12),
        ("m1-long-context", 8, 458e9),
        ("long-cot-sft", 2, 4e9),
    ],
)
def test_the_recipes_are_valid(
    command: Run,  # noqa: F811
    corpus: Path,  # noqa: F811
    tokenizer: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stages: int,
    tokens: float,
) -> None:
    """With corpora that stand in for those that they name."""
    config = parse_config([CONFIGS / f"{name}.yaml"], [])
    blends = [config.data.train, *(stage.settings.get("data.train", []) for stage in config.stages)]
    for number, prefix in enumerate(sorted({item for blend in blends for item in blend if "/" in item})):
        place = corpus.parent / prefix
        place.parent.mkdir(exist_ok=True)
        shutil.copy(f"{corpus}.idx", f"{place}.idx")
        content = bytearray(Path(f"{corpus}.bin").read_bytes())
        content[0] = 10 + number
        Path(f"{place}.bin").write_bytes(content)
    monkeypatch.chdir(corpus.parent)
    words = ["pretrain", "--config", CONFIGS / f"{name}.yaml", "--dry-run", "--device", "gpu", "--world-size", 2048]
    status, out, err = command(*words, "--data.tokenizer", tokenizer)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.split()[:2] == ["stage", "tokens"])
    assert len(lines) - at - 2 == stages == len(config.stages)
    last = course(config)[-1].end
    assert 0 <= last - tokens < 300e6
    assert any(line.startswith("steps ") and f"{last:,} tokens" in line for line in lines)


def test_the_tiny_recipe_is_valid(command: Run, tmp_path: Path) -> None:  # noqa: F811
    flags = ["--data.embedded_corpus", tmp_path / "corpus", "--run.folder", tmp_path / "run", "--world-size", 2]
    status, out, err = command("pretrain", "--config", CONFIGS / "tiny-recipe.yaml", "--dry-run", *flags)
    assert (status, err) == (0, "")
    assert f"to be built in {tmp_path / 'corpus'}" in out
    assert "pre-training, 1 of 7" in out
    assert list(tmp_path.iterdir()) == []
