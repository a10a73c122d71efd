"""Weights of corpora over a transition, caps in epochs, and corpora that end before the tokens do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import resolve
from megatron_m1.config.schedules import Position, schedules_at
from megatron_m1.training.blend import Blends, caps_by_prefix, open_blends
from megatron_m1.training.stage_checks import check_epochs

STAGES: list[dict[str, Any]] = [
    {"name": "a", "tokens": 1000},
    {"name": "b", "tokens": 2000, "data": {"train": ["1", "web", "3", "code"], "train_transition_tokens": 1000}},
    {"name": "c", "tokens": 500},
    {"name": "d", "tokens": 1000, "data": {"train": ["code"]}},
]


def blends_at(tokens: int, begun: dict[str, int]) -> Blends:
    config = parse_config([], ["--data.train=[1, web, 1, prose]"])
    config.stages = parse_config([_file()], []).stages
    config.stages[3].settings["data.train"] = ["1", "code"]
    schedules = schedules_at(config, Position(1, tokens, begun))
    return open_blends(schedules, schedules.stage.config.data.train)


def _file() -> Path:
    path = Path("stages.yaml")
    path.write_text(yaml.safe_dump({"stages": STAGES}))
    return path


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(blends: Blends, tokens: int) -> dict[str, float]:
    return dict(zip(blends.prefixes, blends.weights(tokens), strict=True))


def test_weights_go_in_a_straight_line_from_one_blend_to_the_next() -> None:
    """To a thousandth of the transition, from where the stage really began."""
    assert weights(blends_at(0, {}), 999) == {"web": 0.5, "prose": 0.5}
    blends = blends_at(1003, {"a": 0, "b": 1003})
    for thousandth in range(1001):
        share = thousandth / 1000
        found = weights(blends, 1003 + thousandth)
        expected = {"web": 0.5 - 0.25 * share, "prose": 0.5 * (1 - share), "code": 0.75 * share}
        assert found == pytest.approx(expected, abs=1e-12)
    assert weights(blends, 2500) == {"web": 0.25, "code": 0.75, "prose": 0.0}


def test_a_transition_goes_on_in_a_stage_that_names_no_blend() -> None:
    """And does not begin again."""
    begun = {"a": 0, "b": 1000, "c": 3000}
    assert weights(blends_at(3000, begun), 1500) == weights(blends_at(1500, {"a": 0, "b": 1000}), 1500)
    assert weights(blends_at(3000, begun), 3100) == {"web": 0.25, "code": 0.75, "prose": 0.0}
    last = blends_at(3500, begun | {"d": 3500})
    assert weights(last, 3500) == {"code": 0.75, "web": 0.25, "prose": 0.0}
    assert weights(last, 4500) == {"code": 1.0, "web": 0.0, "prose": 0.0}


def test_corpora_do_not_depend_on_where_a_run_goes_on() -> None:
    begun = {"a": 0, "b": 1000}
    assert blends_at(1000, begun).prefixes == blends_at(2900, begun).prefixes == ["web", "code", "prose"]


def test_caps_are_found_by_any_spelling() -> None:
    data = parse_config([], ["--data.max_epochs=[4, ./code, 0.5, web]"]).data
    assert caps_by_prefix(data, ["code", "web", "prose"]) == {"code": 4.0, "web": 0.5}
    assert caps_by_prefix(parse_config([], ["--data.max_epochs=2"]).data, ["code"]) == {"code": 2.0}
    assert caps_by_prefix(parse_config([], []).data, ["code"]) == {}


def checked(corpus: dict[str, Any], second: str, stages: list[dict[str, Any]], *flags: str) -> None:
    path = Path("run.yaml")
    path.write_text(yaml.safe_dump({"data": {"train": corpus["train"], "seq_length": 64}, "stages": stages}))
    check_epochs(resolve(parse_config([path], list(flags)), 1, has_gpu=False))


def test_corpora_that_are_used_up_before_the_tokens_end(tiny_corpus: dict[str, Any], second_corpus: str) -> None:
    (first,) = tiny_corpus["train"]
    half = {"data": {"train": ["0.5", first, "0.5", second_corpus], "max_epochs": ["1", first, "1", second_corpus]}}
    # One takes the weight of the other that is used up, until it is itself.
    checked(tiny_corpus, second_corpus, [{"name": "a", "tokens": 80_000, **half}])
    with pytest.raises(ValueError, match=r"^stage b: data\.max_epochs lets data\.train give [\d,]+ of 30,000 tokens: "):
        checked(tiny_corpus, second_corpus, [{"name": "a", "tokens": 80_000, **half}, {"name": "b", "tokens": 30_000}])
    with pytest.raises(ValueError, match=r"^data\.max_epochs lets data\.train give [\d,]+ of 4,096,000 tokens: "):
        checked(tiny_corpus, second_corpus, [], "--data.max_epochs=1", "--train.max_steps=8000")
    with pytest.raises(ValueError, match=r"^data\.max_epochs names nowhere, which is in no blend of the run"):
        checked(tiny_corpus, second_corpus, [], "--data.max_epochs=[1, nowhere]")
