"""Stages of a run: how they are written and read, what each inherits, and one line for what can't be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_m1.config import Config
from megatron_m1.config.help import tree_help
from megatron_m1.config.io import load_config, parse_config
from megatron_m1.config.portable import located, portable
from megatron_m1.config.resolve import resolve
from megatron_m1.config.schedules import Position, course
from megatron_m1.config.stages import AUX, BATCH, BLEND, CLIP, LR, stage_at, stages_of
from megatron_m1.config.tree import StageConfig
from megatron_m1.config.written import config_text, write_config

YAML = """\
data: {seq_length: 64, train: [corpora/web]}
train: {global_batch_size_schedule: [0, 4, 1K, 8]}
stages:
  - {name: short, tokens: 1.5K}
  - name: long.1
    tokens: 3K
    data: {seq_length: 128, train: [0.5, corpora/web, 0.5, ~/code]}
    model: {rotary_base: 5.0e6, lm_head_precision: bf16}
    train: {global_batch_size: 2}
  - {name: 3rd, tokens: 500, optimizer: {clip_grad: 0.5}, parallel: {context_parallel_size: 2}}
"""


def read(tmp_path: Path, text: str = YAML, flags: list[str] | None = None) -> Config:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return parse_config([file], flags or [])


def message_of(tmp_path: Path, text: str, flags: list[str] | None = None, *, world_size: int = 2) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        resolve(read(tmp_path, text, flags), world_size, has_gpu=False)
    return str(caught.value)


def test_a_file_s_stages_are_typed_and_written_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = read(tmp_path)
    assert config.stages == [
        StageConfig("short", 1500),
        StageConfig(
            "long.1",
            3000,
            {
                "data.seq_length": 128,
                "data.train": ["0.5", "corpora/web", "0.5", "/home/me/code"],
                "model.rotary_base": 5e6,
                "model.lm_head_precision": "bf16",
                "train.global_batch_size": 2,
            },
        ),
        StageConfig("3rd", 500, {"optimizer.clip_grad": 0.5, "parallel.context_parallel_size": 2}),
    ]
    write_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_text(parse_config([], [])).count("stages") == 0
    assert "stages:" in tree_help(config)


def test_a_stage_inherits_from_the_one_before_it(tmp_path: Path) -> None:
    short, long, third = stages_of(read(tmp_path))
    assert [stage.end for stage in (short, long, third)] == [1500, 4500, 5000]
    assert (short.config.data.seq_length, long.config.data.seq_length, third.config.data.seq_length) == (64, 128, 128)
    assert third.config.model.rotary_base == long.config.model.rotary_base == 5e6
    assert (long.config.optimizer.clip_grad, third.config.optimizer.clip_grad) == (1.0, 0.5)
    # One that names a batch has no schedule of batches.
    assert short.config.train.global_batch_size_schedule == [0, 4, 1000, 8]
    assert third.config.train.global_batch_size_schedule == []
    assert third.origins == {LR: 0, BATCH: 1, CLIP: 2, AUX: 0, BLEND: 1}


def test_without_stages_there_is_one(tmp_path: Path) -> None:
    config = parse_config([], ["--train.max_steps=7"])
    (stage,) = stages_of(config)
    assert (stage.name, stage.tokens, stage.end, stage.config) == ("", None, None, config)
    (span,) = course(config)
    assert (span.first_step, span.last_step, span.end) == (1, 7, 7 * 8 * 512)
    assert course(config, Position(7, 7 * 8 * 512)) == []
    assert course(parse_config([], []))[0].last_step == 1000


def test_what_a_checkpoint_keeps_of_a_stage_goes_on_alike(tmp_path: Path) -> None:
    """Its values are at the top level there, for everything that reads a model from it."""
    config = read(tmp_path)
    third = stages_of(config)[2].config
    assert (third.model.rotary_base, third.stages) == (5e6, config.stages)
    assert [stage.config for stage in stages_of(third)[2:]] == [third]


def test_paths_of_stages_move_with_the_run(tmp_path: Path) -> None:
    config = read(tmp_path, YAML.replace("~/code", f"{tmp_path}/run/own"))
    kept = portable(config, tmp_path / "run")
    assert kept.stages[1].settings["data.train"][3] == "own"
    kept.run.folder = "."
    assert located(kept, tmp_path / "moved").stages[1].settings["data.train"][3] == f"{tmp_path}/moved/own"


def test_flags_of_stages_win_over_the_file(tmp_path: Path) -> None:
    flags = ["--stages.long.1.data.seq_length=256", "--stages.3rd.tokens", "2K", "--stages.short.train.seed_x", "1"]
    config = read(tmp_path, YAML, flags[:3])
    assert (config.stages[1].settings["data.seq_length"], config.stages[2].tokens) == (256, 2000)
    assert read(tmp_path, YAML, ["--optimizer.lr=0.1"]).optimizer.lr == 0.1
    base = read(tmp_path)
    assert parse_config([], ["--stages.short.tokens=9"], base=base).stages[0].tokens == 9


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--data.seq_length=9", ["stage long.1 names data.seq_length", "--stages.long.1.data.seq_length"]),
        ("--stages.long_1.data.seq_length=9", ["no stage long_1", "did you mean --stages.long.1.data.seq_length?"]),
        ("--stages.x.tokens=9", ["there is no stage x", "the stages are short, long.1, 3rd"]),
        ("--stages.short.data.seq_len=9", ["did you mean --stages.short.data.seq_length?"]),
        ("--stages.short.tokens=0", ["stage short: tokens = '0'", "above 0"]),
        ("--stages.short.tokens=1.5", ["stage short: tokens = '1.5'"]),
        ("--stages.short.run.folder=x", ["stage short names run.folder", "the whole run's", "at the top level"]),
        ("--stages.short.data.seq_length=32K", ["stage short: data.seq_length = '32K'", "write 32000 or 32768"]),
        ("--stages.short=9", ["unknown option --stages.short", "--stages.NAME.group.field"]),
        ("--stages.short.tokens", ["--stages.short.tokens needs a value: an integer"]),
    ],
)
def test_a_wrong_flag_is_one_line(flag: str, parts: list[str], tmp_path: Path) -> None:
    message = message_of(tmp_path, YAML, [flag])
    assert [part for part in parts if part not in message] == [], message


STAGE = "stages: [{name: a, tokens: 1000}, {name: b, tokens: 1000, %s}]\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stages: {a: 1}", ["stages must be a list"]),
        ("stages: [3]", ["stage 1 must have name, tokens and groups, not 3"]),
        ("stages: [{tokens: 5}]", ["stage 1 has the name None"]),
        ("stages: [{name: a b, tokens: 5}]", ["stage 1 has the name 'a b'"]),
        ("stages: [{name: a}]", ["stage a: tokens = None"]),
        ("stages: [{name: a, tokens: 0}]", ["stage a: tokens = 0", "above 0"]),
        ("stages: [{name: a, tokens: 5}, {name: a, tokens: 6}]", ["two stages called a"]),
        (STAGE % "dta: {}", ["stage b: unknown key dta: did you mean data?"]),
        (STAGE % "data: {seq_len: 5}", ["stage b: unknown key data.seq_len: did you mean data.seq_length?"]),
        (STAGE % "data: {seq_length: five}", ["stage b: data.seq_length = 'five' is not an integer"]),
        (STAGE % "preset: tiny", ["stage b names preset", "another one"]),
        (STAGE % "model: {num_layers: 4}", ["stage b names model.num_layers", "another one"]),
        (STAGE % "model: {attention_period: 4}", ["stage b names model.mixers", "another one"]),
        (STAGE % "data: {tokenizer: x}", ["stage b names data.tokenizer", "whole run's"]),
        (STAGE % "train: {seed: 1}", ["stage b names train.seed", "whole run's"]),
        (STAGE % "train: {max_steps: 1}", ["stage b names train.max_steps", "whole run's"]),
        (STAGE % "run: {init_from: x}", ["stage b names run.init_from", "whole run's"]),
        (
            STAGE % "optimizer: {lr: 1.0e-4}",
            ["stage b begins with the learning rate 0.0001", "stage a ends with 0.0002"],
        ),
        (STAGE % "optimizer: {lr_warmup_steps: 5}", ["b begins with the learning rate 0, its warm-up,", "lr_may_jump"]),
        (STAGE % "train: {global_batch_size: 3}", ["stage b: train.global_batch_size = 3 is not divisible"]),
        (STAGE % "train: {global_batch_size_schedule: [0, 2, 5, 3]}", ["stage b: ", "schedule = 3 is not divisible"]),
        (STAGE % "train: {global_batch_size_schedule: [0, 2.5]}", ["a batch of 2.5 packs"]),
        (STAGE % "optimizer: {clip_grad_schedule: [0, 1, 5]}", ["stage b: optimizer.clip_grad_schedule has 3 numbers"]),
        (
            STAGE % "parallel: {context_parallel_size: 300}",
            ["stage b: parallel.context_parallel_size = 300 needs packs of at least 600 tokens"],
        ),
        (
            STAGE % "parallel: {expert_model_parallel_size: 3}",
            ["stage b: ", "model.num_moe_experts = 8 is not divisible by", "expert_model_parallel_size = 3"],
        ),
        (STAGE % "optimizer: {lr_segments: [flat, 1, 2]}", ["stage b: optimizer.lr_segments has the shape 'flat'"]),
        (STAGE % "optimizer: {lr_segments: [linear, 1]}", ["stage b: optimizer.lr_segments has 2 items"]),
        (STAGE % "optimizer: {lr_segments: [linear, 0, 1e-5]}", ["a segment of '0' tokens"]),
        (STAGE % "optimizer: {lr_segments: [exponential, 1, 0]}", ["comes to 0, which no exponential decay does"]),
        (STAGE % "data: {max_epochs: [4, a, 2]}", ["stage b: data.max_epochs has 3 items"]),
        (STAGE % "data: {max_epochs: 0}", ["stage b: data.max_epochs = '0'", "above 0"]),
        (
            "optimizer: {lr_segments: [linear, 9, 1e-5], lr_decay_tokens: 5}",
            ["lr_decay_tokens = 5 and lr_segments both"],
        ),
        ("optimizer: {lr_warmup_steps: 3, lr_warmup_tokens: 5}", ["lr_warmup_tokens = 5 and lr_warmup_steps = 3"]),
    ],
)
def test_a_wrong_recipe_is_one_line(text: str, parts: list[str], tmp_path: Path) -> None:
    message = message_of(tmp_path, text)
    assert [part for part in parts if part not in message] == [], message


def test_a_jump_of_the_learning_rate_may_be_said(tmp_path: Path) -> None:
    said = STAGE % "optimizer: {lr: 1.0e-4, lr_may_jump: true}"
    assert resolve(read(tmp_path, said), 1, has_gpu=False).optimizer.lr == 2e-4
    # Only of the stage that says it.
    more = said.replace("}]\n", "}, {name: c, tokens: 9, optimizer: {lr: 2.0e-4}}]\n")
    assert "stage c begins with the learning rate 0.0002" in message_of(tmp_path, more)


def test_a_run_goes_on_in_the_stage_of_its_checkpoint(tmp_path: Path) -> None:
    stages = stages_of(read(tmp_path))
    assert stage_at(stages, {}, 0) == (0, {"short": 0})
    assert stage_at(stages, {"short": 0}, 1499) == (0, {"short": 0})
    assert stage_at(stages, {"short": 0}, 1536) == (1, {"short": 0, "long.1": 1536})
    assert stage_at(stages, {"short": 0, "long.1": 1536}, 4499) == (1, {"short": 0, "long.1": 1536})
    assert stage_at(stages, {"short": 0, "long.1": 1536}, 9999)[0] == 2
    # A checkpoint of a run without stages, and the other way round.
    assert stage_at(stages, {"": 0}, 1536) == (1, {"short": 0, "long.1": 1536})
    assert stage_at(stages_of(parse_config([], [])), {"short": 0, "long.1": 1536}, 9999) == (0, {"": 0})
    with pytest.raises(ValueError, match=r"in stage other, which is none of the run's \(short, long\.1, 3rd\)"):
        stage_at(stages, {"other": 0}, 5)


def test_the_present_stage_is_resolved_for_these_processes_and_others_for_their_own(tmp_path: Path) -> None:
    config = read(tmp_path)
    first = resolve(config, 1, has_gpu=False)
    assert (first.stage, first.data.seq_length, first.recipe) == (0, 64, config)
    assert first.train.max_steps == course(config)[-1].last_step
    at = Position(20, 4600, {"short": 0, "long.1": 1536})
    with pytest.raises(ValueError, match=r"^stage 3rd: the mesh does not divide the world"):
        resolve(config, 1, has_gpu=False, at=at)
    third = resolve(config, 2, has_gpu=False, at=at)
    assert (third.stage, third.parallel.context_parallel_size, third.asked.data.seq_length) == (2, 2, 128)
