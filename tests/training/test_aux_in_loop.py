"""A run whose load-balancing loss changes its weight by tokens, against runs with a constant one: the loop sets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_m1.runtime.pool import WorkerPool
from tests.training import loop_runs as runs

STEPS = 4
SCHEDULE = "train.moe_aux_loss_coeff_schedule"
COEFFICIENT = "model.moe_aux_loss_coeff"
BEFORE, AFTER = 0.0, 5.0
TOKENS_A_STEP = 256
CHANGES_AT = 3
"""The first step with the other weight."""


def figures(
    name: str, tmp_path: Path, corpus: dict[str, Any], workers: WorkerPool, *settings: runs.Setting
) -> list[tuple[Any, ...]]:
    """What a run records of every step, exactly."""
    common = [("train.max_steps", STEPS), ("train.eval_interval", 0), ("run.save_interval", 0)]
    path = runs.write_settings(tmp_path / f"{name}.yaml", corpus, tmp_path / name, *common, *settings)
    workers.run(runs.train, path, world_size=1)
    return runs.trace(tmp_path / name)[:STEPS]


def test_a_step_uses_the_weight_of_its_tokens(tmp_path: Path, tiny_corpus: dict[str, Any], workers: WorkerPool) -> None:
    """Bit for bit a constant run until the weight changes, and at the change the gradient of the other's."""
    end = TOKENS_A_STEP * CHANGES_AT
    jump = [0, BEFORE, end - 1, BEFORE, end, AFTER]
    scheduled = figures("scheduled", tmp_path, tiny_corpus, workers, (SCHEDULE, jump))
    before = figures("before", tmp_path, tiny_corpus, workers, (COEFFICIENT, BEFORE))
    after = figures("after", tmp_path, tiny_corpus, workers, (COEFFICIENT, AFTER))
    assert len(scheduled) == STEPS
    assert scheduled[: CHANGES_AT - 1] == before[: CHANGES_AT - 1]
    assert after[0] != before[0], "the weight is seen nowhere: the test would prove nothing"
    recorded = [(line.get("aux_loss"), line["aux_loss_coeff"]) for line in runs.records(tmp_path / "scheduled")[:STEPS]]
    assert [weight for _, weight in recorded] == [BEFORE] * (CHANGES_AT - 1) + [AFTER] * (STEPS - CHANGES_AT + 1)
    assert [aux is None for aux, _ in recorded] == [weight == 0 for _, weight in recorded]
    assert all(aux is None or aux > 0.9 for aux, _ in recorded)
    for name in ("before", "after"):
        for line in runs.records(tmp_path / name)[:STEPS]:
            assert "aux_loss_coeff" not in line
            assert ("aux_loss" in line) == (name == "after")
    # The weights are still those of the constant run, and so is the loss; what the step adds to it is not.
    step, reference = scheduled[CHANGES_AT - 1], before[CHANGES_AT - 1]
    loss, norm = (1 + runs.EXACT.index(name) for name in ("loss", "grad_norm"))
    assert step[loss] == reference[loss]
    assert step[norm] > 1.1 * reference[norm]
    assert scheduled[-1][loss] != before[-1][loss]


def test_a_constant_schedule_is_a_constant(tmp_path: Path, tiny_corpus: dict[str, Any], workers: WorkerPool) -> None:
    """Of the schedule's weight, not of the model's."""
    scheduled = figures("scheduled", tmp_path, tiny_corpus, workers, (SCHEDULE, [0, AFTER]))
    constant = figures("constant", tmp_path, tiny_corpus, workers, (COEFFICIENT, AFTER))
    assert scheduled == constant


def test_a_loss_that_nothing_computes_is_not_recorded(
    tmp_path: Path, tiny_corpus: dict[str, Any], workers: WorkerPool
) -> None:
    """Nothing balances, whatever the weight."""
    figures("none", tmp_path, tiny_corpus, workers, ("model.moe_router_load_balancing_type", "none"))
    lines = runs.records(tmp_path / "none")[:STEPS]
    assert len(lines) == STEPS
    assert [name for line in lines for name in line if name.startswith("aux")] == []
