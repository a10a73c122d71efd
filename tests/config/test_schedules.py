"""Learning rate, batch, clipping and aux coefficient by tokens: exact at the counts that MiniMax published."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_m1.config import Config
from megatron_m1.config.io import parse_config
from megatron_m1.config.schedules import Schedules, course, schedules_at
from megatron_m1.config.stages import stages_of
from megatron_m1.config.tree import StageConfig

TRILLION = 10**12
PACK = 8192
TEXT_01 = {
    "data": {"seq_length": PACK},
    "optimizer": {
        "lr": 2e-4,
        "lr_warmup_steps": 500,
        "lr_segments": ["constant", "7.2T", 2e-4, "constant", "3.2T", 1.3e-4, "exponential", "1T", 3e-5],
        "clip_grad_schedule": [0, 1.0, "1T", 0.5],
    },
    "train": {
        "global_batch_size_schedule": [0, 2048, "69B", 4096, "790B", 8192, "4.7T", 16384],
        "moe_aux_loss_coeff_schedule": [0, 0.01, "1T", 0.01, "2T", 0.001],
    },
    "stages": [
        {"name": "pre-training", "tokens": "11.4T"},
        {
            "name": "m1",
            "tokens": "7.5T",
            "optimizer": {
                "lr": 8e-5,
                "lr_segments": ["constant", "2.5T", 8e-5, "cosine", "5T", 8e-6],
                "lr_may_jump": True,
            },
            "model": {"rotary_base": 10_000},
        },
        {"name": "128k", "tokens": "300B", "data": {"seq_length": 131072}, "model": {"rotary_base": 5_000_000}},
        {"name": "512k", "tokens": "32B", "data": {"seq_length": 524288}, "model": {"rotary_base": 10_000_000}},
        {"name": "1m", "tokens": "26B", "data": {"seq_length": 1048576}},
    ],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Config:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump(TEXT_01))
    return parse_config([file], [])


def nominal(config: Config, index: int) -> Schedules:
    stages = tuple(stages_of(config))
    return Schedules(stages, index, {stage.name: stage.nominal_start for stage in stages})


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (2048 * PACK, 2e-4 / 500),
        (250 * 2048 * PACK, 1e-4),
        (500 * 2048 * PACK, 2e-4),
        (7_200_000_000_000 - 1, 2e-4),
        (7_200_000_000_000, 1.3e-4),
        (10_400_000_000_000 - 1, 1.3e-4),
        (10_400_000_000_000, 1.3e-4),
        (10_900_000_000_000, (1.3e-4 * 3e-5) ** 0.5),
        (11_400_000_000_000, 3e-5),
    ],
)
def test_the_learning_rate_of_text_01(recipe: Config, tokens: int, rate: float) -> None:
    assert nominal(recipe, 0).learning_rate(tokens) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [(0, 8e-5), (2.5e12, 8e-5), (5e12, (8e-5 + 8e-6) / 2), (7.5e12, 8e-6), (7.7e12, 8e-6), (7.858e12, 8e-6)],
)
def test_the_learning_rate_of_m1_s_continuation_and_of_the_stages_that_name_none(
    recipe: Config, tokens: float, rate: float
) -> None:
    start = 11_400_000_000_000
    index = 1 if tokens < 7.5e12 else 2 if tokens < 7.8e12 else 4
    assert nominal(recipe, index).learning_rate(start + int(tokens)) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "millions"),
    [
        (0, 16),
        (69 * 10**9 - 1, 16),
        (69 * 10**9, 32),
        (790 * 10**9 - 1, 32),
        (790 * 10**9, 64),
        (4_700_000_000_000 - 1, 64),
        (4_700_000_000_000, 128),
        (11_399_999_999_999, 128),
    ],
)
def test_the_batch_of_text_01(recipe: Config, tokens: int, millions: int) -> None:
    assert nominal(recipe, 0).step_tokens(tokens) == millions * 1024 * 1024


@pytest.mark.parametrize(
    ("tokens", "coefficient", "clip"),
    [(0, 0.01, 1.0), (TRILLION // 2, 0.01, 0.75), (3 * TRILLION // 2, 0.0055, 0.5), (9 * TRILLION, 0.001, 0.5)],
)
def test_aux_coefficient_and_clipping(recipe: Config, tokens: int, coefficient: float, clip: float) -> None:
    schedules = nominal(recipe, 0)
    assert schedules.aux_loss_coefficient(tokens) == pytest.approx(coefficient, rel=1e-14)
    assert schedules.clip_grad(tokens) == pytest.approx(clip, rel=1e-14)
    # A stage that names neither goes on with both.
    assert nominal(recipe, 4).aux_loss_coefficient(12 * TRILLION) == 0.001


def test_rotary_base_and_length_by_stage(recipe: Config) -> None:
    found = [(stage.config.data.seq_length, stage.config.model.rotary_base) for stage in stages_of(recipe)]
    assert found == [(8192, 1e4), (8192, 1e4), (131072, 5e6), (524288, 1e7), (1048576, 1e7)]


def test_steps_of_the_whole_course(recipe: Config) -> None:
    """Counted one by one on a recipe a hundred-millionth the size, and in leaps on this one."""
    spans = course(recipe)
    assert [span.stage.name for span in spans] == ["pre-training", "m1", "128k", "512k", "1m"]
    for span, following in zip(spans, [*spans[1:], None], strict=True):
        assert span.stage.end is not None
        overshoot = span.end - span.stage.end
        assert 0 <= overshoot < span.schedules.step_tokens(span.end - 1)
        if following is not None:
            assert (following.tokens, following.first_step) == (span.end, span.last_step + 1)
    small = parse_config([], ["--data.seq_length=7", "--train.global_batch_size_schedule=[0, 2, 100, 3, 250, 5]"])
    small.stages = [StageConfig("a", 321), StageConfig("b", 150, {"data.seq_length": 11})]
    spans = course(small)
    tokens, step, ends = 0, 0, []
    for end, length in ((321, 7), (471, 11)):
        while tokens < end:
            tokens += (2 if tokens < 100 else 3 if tokens < 250 else 5) * length
            step += 1
        ends.append((step, tokens))
    assert [(span.last_step, span.end) for span in spans] == ends


def test_a_stage_split_in_two_has_the_schedules_of_one() -> None:
    flags = [
        "--optimizer.lr_warmup_steps=3",
        "--optimizer.lr_segments=[linear, 9000, 1e-5]",
        "--train.global_batch_size_schedule=[0, 2, 3000, 4]",
        "--optimizer.clip_grad_schedule=[0, 1, 9000, 0.1]",
    ]
    whole, split = parse_config([], flags), parse_config([], flags)
    whole.stages = [StageConfig("a", 4000), StageConfig("b", 6000, {"optimizer.lr": 1e-4})]
    # Not at the end of a step.
    split.stages = [StageConfig("a", 4000), StageConfig("b", 777, {"optimizer.lr": 1e-4}), StageConfig("c", 5223)]

    def trace(config: Config) -> list[tuple[float, ...]]:
        steps: list[tuple[float, ...]] = []
        for span in course(config):
            tokens = span.tokens
            for number in range(span.first_step, span.last_step + 1):
                packs, schedules = span.schedules.packs(tokens), span.schedules
                tokens += span.schedules.step_tokens(tokens)
                steps.append((number, packs, tokens, schedules.learning_rate(tokens), schedules.clip_grad(tokens)))
        return steps

    assert trace(whole) == trace(split)


def test_a_run_may_stop_before_its_stages_do(recipe: Config) -> None:
    recipe.train.max_steps = 10
    try:
        (span,) = course(recipe)
    finally:
        recipe.train.max_steps = None
    assert (span.first_step, span.last_step, span.end) == (1, 10, 10 * 2048 * PACK)


def test_warm_up_in_steps_counts_the_ramp_s_tokens() -> None:
    config = parse_config([], ["--data.seq_length=10", "--optimizer.lr_warmup_steps=4", "--optimizer.lr=1"])
    config.train.global_batch_size_schedule = [0, 1, 20, 2]
    schedules = schedules_at(config)
    assert schedules.warmup_tokens == 10 + 10 + 20 + 20
    assert [schedules.learning_rate(tokens) for tokens in (10, 30, 60, 80)] == [1 / 6, 0.5, 1.0, 1.0]


def test_the_recipe_s_file_has_no_other_spelling_of_its_numbers(recipe: Config, tmp_path: Path) -> None:
    """In YAML, ``69e9``, ``69B`` and 69000000000 are one number."""
    for spelt in ("[0, 2048, 69e9, 4096]", "[0, 2048, 69B, 4096]", "[0, 2048, 69000000000, 4096]"):
        file = tmp_path / "a.yaml"
        file.write_text(f"train: {{global_batch_size_schedule: {spelt}}}\n")
        assert parse_config([file], []).train.global_batch_size_schedule == [0, 2048, 69e9, 4096]
