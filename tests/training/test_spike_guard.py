"""Which gradient norms are spikes, when a run ends with one, and what of that a checkpoint keeps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import resolve
from megatron_m1.config.tree import TrainConfig
from megatron_m1.training.progress import stored_progress
from megatron_m1.training.spike_guard import Spike, SpikeGuard, checked_state

STATE = {"step": 9, "tokens": 4, "consumed_samples": 4, "train_samples": 9, "skipped_total": 0, "skipped_in_row": 0}


def guard(mode: str = "skip", *, factor: float = 3.0, window: int = 4, most: int = 3) -> SpikeGuard:
    return SpikeGuard(TrainConfig(spike_guard=mode, spike_factor=factor, spike_window=window, max_spikes=most))  # type: ignore[arg-type]


def spikes(judge: SpikeGuard, norms: Sequence[float], first: int = 1) -> list[int]:
    """Steps of the spikes among ``norms``."""
    return [step for step, norm in enumerate(norms, first) if judge.judge(step, norm) is not None]


def test_a_spike_is_far_above_the_median_of_those_before_it() -> None:
    judge = guard()
    assert spikes(judge, [1.0, 2.0]) == []
    assert judge.judge(3, 4.6) == Spike(3, 1, 4.6, 1.5, 2)
    # 4.5 is no more than three times the median.
    assert judge.judge(4, 4.5) is None
    assert judge.judge(5, 6.1) == Spike(5, 2, 6.1, 2.0, 3)
    assert judge.total == 2


def test_nothing_is_judged_before_half_of_the_window_is_there() -> None:
    assert spikes(guard(window=6), [1.0, 99.0, 1.0, 99.0]) == [4]
    assert spikes(guard(window=5), [1.0, 99.0, 1.0, 99.0]) == [4]


def test_spikes_do_not_enter_the_median_and_old_norms_leave_it() -> None:
    judge = guard()
    assert spikes(judge, [1, 1, 1, 1, 50, 50, 50]) == [5, 6, 7]
    assert spikes(judge, [2, 4, 8, 14], first=8) == [9, 10, 11]
    assert spikes(judge, [2, 2, 2, 5], first=12) == []


@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0])
def test_what_is_no_norm_of_a_gradient_counts_nowhere(norm: float) -> None:
    judge = guard()
    assert spikes(judge, [1.0, norm, 1.0, norm, 3.5]) == [5]
    assert len(judge.state_dict()["norms"]) == 2


def test_off_judges_nothing() -> None:
    judge = guard("off")
    assert spikes(judge, [1.0, 1.0, 1.0, 99.0]) == []
    assert judge.state_dict() == {"total": 0, "steps": [], "norms": []}


def ends(judge: SpikeGuard, norms: Sequence[float], first: int = 1) -> list[str | None]:
    """What is said of each spike as it comes."""
    found = (judge.judge(step, norm) for step, norm in enumerate(norms, first))
    return [judge.end_of_run(spike) for spike in found if spike is not None]


def test_stop_ends_with_the_first() -> None:
    (reason,) = ends(guard("stop", most=0), [1.0, 1.0, 9.0])
    assert reason is not None and "\n" not in reason
    assert reason.startswith(
        "step 3: gradient norm 9 is 9 times the median 1 of 2 steps, and train.spike_guard is stop"
    )


@pytest.mark.parametrize("mode", ["count", "skip", "rollback"])
def test_too_many_within_the_window_end_the_run(mode: str) -> None:
    *before, last = ends(guard(mode), [1, 1, 9, 9, 1, 9])
    assert before == [None, None] and last is not None
    assert "3 spikes within 4 steps (train.max_spikes): lower optimizer.lr" in last
    # One every fourth step: there are never three within four steps.
    assert set(ends(guard(mode), [1, 1, *[9, 1, 1, 1] * 9])) == {None}
    assert set(ends(guard(mode, most=0), [1, 1, *[9] * 99])) == {None}


@pytest.mark.parametrize("pattern", [(9,), (100, 9), (9, 100), (100, 50, 9, 50)])
def test_going_back_again_and_again_comes_to_an_end(pattern: tuple[int, ...]) -> None:
    """Whatever the steps at which the spikes are, and however far apart."""
    judge = guard("rollback", most=5)
    before = {"total": 0, "steps": [], "norms": [1.0, 1.0]}
    for turn in range(100):
        judge.go_back(before)
        spike = judge.judge(pattern[turn % len(pattern)], 9.0)
        assert spike is not None and spike.number == turn + 1
        if judge.end_of_run(spike):
            break
    assert turn < 5 * len(pattern)
    assert len(judge.state_dict()["steps"]) <= 5


def test_a_resumed_guard_decides_the_same() -> None:
    norms = [1.0, 1.1, 0.7, 9.0, 1.3, 2.9, 8.0, 1.0, 1 / 3]
    straight = guard()
    expected = spikes(straight, norms)
    for cut in range(len(norms)):
        first, second = guard(), guard()
        found = spikes(first, norms[:cut])
        # Through a checkpoint's file, bit for bit.
        second.load_state_dict(
            stored_progress(json.loads(json.dumps({**STATE, "spike_guard": first.state_dict()}))).spike_guard
        )
        found += spikes(second, norms[cut:], first=cut + 1)
        assert found == expected and second.state_dict() == straight.state_dict()


def test_a_checkpoint_of_before_there_were_guards_still_loads() -> None:
    judge = guard()
    judge.load_state_dict(stored_progress(STATE).spike_guard)
    assert judge.state_dict() == guard().state_dict()


def test_a_smaller_window_takes_the_last_norms() -> None:
    judge = guard(window=2)
    judge.load_state_dict({"total": 1, "steps": [3], "norms": [1.0, 2.0, 3.0]})
    assert judge.state_dict() == {"total": 1, "steps": [3], "norms": [2.0, 3.0]}


@pytest.mark.parametrize(
    "state",
    [
        7,
        None,
        {"total": 1},
        {"total": 1, "steps": [], "norms": [], "more": 1},
        {"total": 1.0, "steps": [], "norms": []},
        {"total": 1, "steps": [-1], "norms": []},
        {"total": 1, "steps": [True], "norms": []},
        {"total": 1, "steps": {}, "norms": []},
        {"total": 1, "steps": [1], "norms": [math.nan]},
        {"total": 1, "steps": [1], "norms": [math.inf]},
        {"total": 1, "steps": [1], "norms": [[1.0]]},
        {"total": 1, "steps": [1], "norms": ["1.0"]},
        {"total": 1, "steps": [1], "norms": [1 << 4000]},
    ],
)
def test_states_of_no_guard(state: Any) -> None:
    with pytest.raises(ValueError, match=r"which is no state of a spike guard$"):
        checked_state(state)
    with pytest.raises(ValueError, match=r"^state.json of the checkpoint has spike_guard = .*no state of") as refused:
        stored_progress({**STATE, "spike_guard": state})
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.spike_factor", "1"], "train.spike_factor = 1.0: it must be a finite number above 1"),
        (["--train.spike_factor", ".nan"], "train.spike_factor = nan: it must"),
        (["--train.spike_window", "1"], "train.spike_window = 1: a median needs at least 2 steps"),
        (["--train.max_spikes", "-1"], "train.max_spikes = -1: it must be a finite number, 0 or above"),
        (["--train.grad_norm_interval", "-1"], "train.grad_norm_interval = -1: it must"),
        (
            ["--train.spike_guard", "rollback", "--train.max_spikes", "0"],
            "train.max_spikes = 0 with train.spike_guard rollback might go back for ever: give 1 or more",
        ),
        (["--train.spike_guard", "undo"], "train.spike_guard"),
    ],
)
def test_settings_are_checked(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        resolve(parse_config([], flags), 1, has_gpu=False)
    assert "\n" not in str(refused.value)
