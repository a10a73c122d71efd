"""The schedule against torch's own schedulers, and its corners."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, SequentialLR

from megatron_m1.config import OptimizerConfig
from megatron_m1.config.lr import learning_rate

WARMUP, CONSTANT, DECAY = 5, 3, 7
PEAK, FINAL = 3e-4, 2e-5


def schedule(**changes: object) -> OptimizerConfig:
    config = OptimizerConfig(
        lr=PEAK, min_lr=FINAL, lr_warmup_tokens=WARMUP, lr_constant_tokens=CONSTANT, lr_decay_tokens=DECAY
    )
    for name, value in changes.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("style", ["linear", "cosine", "exponential"])
def test_against_torch(style: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    decay = {
        "linear": lambda: LinearLR(optimizer, 1.0, FINAL / PEAK, DECAY),
        "cosine": lambda: CosineAnnealingLR(optimizer, DECAY, FINAL),
        "exponential": lambda: ExponentialLR(optimizer, (FINAL / PEAK) ** (1 / DECAY)),
    }[style]()
    # torch cannot warm up from 0, hence its start just above.
    warmup = LinearLR(optimizer, 1e-12, 1.0, WARMUP)
    hold = LinearLR(optimizer, 1.0, 1.0, CONSTANT)
    scheduler = SequentialLR(optimizer, [warmup, hold, decay], [WARMUP, WARMUP + CONSTANT])
    for tokens in range(WARMUP + CONSTANT + DECAY + 1):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(tokens, schedule(lr_decay_style=style)) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("style", ["linear", "cosine", "exponential"])
def test_stays_at_the_final_rate(style: str) -> None:
    assert learning_rate(10**15, schedule(lr_decay_style=style)) == pytest.approx(FINAL, rel=1e-12)


def test_no_spans_is_constant() -> None:
    config = schedule(lr_warmup_tokens=0, lr_constant_tokens=0, lr_decay_tokens=0)
    assert [learning_rate(tokens, config) for tokens in (0, 1, 10**12)] == [PEAK] * 3


def test_equal_rates_do_not_decay() -> None:
    assert learning_rate(12, schedule(min_lr=PEAK, lr_decay_style="exponential")) == PEAK


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        (-1, {}, "tokens is -1"),
        (12, {"min_lr": 0.0, "lr_decay_style": "exponential"}, "min_lr is 0.0; exponential"),
        (12, {"lr_decay_style": "steps"}, "lr_decay_style is 'steps'"),
    ],
)
def test_wrong_values_are_named(tokens: int, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate(tokens, schedule(**changes))
