"""The learning rate as a function of the tokens trained on: warm-up, constant, decay, or any segments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched

from megatron_m1.config.numbers import whole_number
from megatron_m1.config.tree import OptimizerConfig
from megatron_m1.printing import shown

SHAPES = ("constant", "linear", "cosine", "exponential")
_FORM = "give shape, tokens and learning rate at the end of each, as [constant, 7.2T, 2e-4, exponential, 1T, 3e-5]"


@dataclass(frozen=True)
class Segment:
    """A part of a schedule."""

    shape: str
    tokens: int
    end: float
    """Learning rate that it comes to, or has throughout if it is constant."""


def parse_segments(items: Sequence[str]) -> list[Segment]:
    """Read ``optimizer.lr_segments``.

    Raises:
        ValueError: no list of shapes, tokens and rates; one line with the bad value.
    """
    name = "optimizer.lr_segments"
    if len(items) % 3:
        raise ValueError(f"{name} has {len(items)} items: {_FORM}")
    return [_segment(name, *item) for item in batched(items, 3)]


def _segment(name: str, shape: str, length: str, end: str) -> Segment:
    if shape not in SHAPES:
        raise ValueError(f"{name} has the shape {shown(shape)}: choose one of {', '.join(SHAPES)}")
    tokens = whole_number(name, length, counts=True)
    if not isinstance(tokens, int) or tokens <= 0:
        raise ValueError(f"{name} has a segment of {shown(length)} tokens: {_FORM}")
    try:
        rate = float(end)
    except ValueError:
        raise ValueError(f"{name} has the learning rate {shown(end)}: {_FORM}") from None
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"{name} has the learning rate {shown(end)}: it must be a finite number, 0 or above")
    if shape == "exponential" and rate == 0:
        raise ValueError(f"{name} comes to 0, which no exponential decay does: give it a value above 0")
    return Segment(shape, tokens, rate)


def learning_rate(tokens: int, optimizer_config: OptimizerConfig, *, warmup_tokens: int | None = None) -> float:
    """Return the learning rate of the optimizer step that ends at ``tokens``.

    Linear warm-up from 0, ``lr`` for ``lr_constant_tokens``, then ``lr_decay_style`` from ``lr`` to ``min_lr`` over
    ``lr_decay_tokens``, then ``min_lr``; without decay tokens it stays at ``lr``. Or ``lr_segments``, one after the
    other from 0 tokens on, times what the warm-up has reached.

    Args:
        tokens: of the schedule up to and including this step's global batch, so that the first step is not lost to a
            rate of 0.
        optimizer_config: ``lr``, ``min_lr``, the spans in tokens, ``lr_decay_style`` and ``lr_segments``.
        warmup_tokens: of the warm-up; None for ``lr_warmup_tokens``.

    Raises:
        ValueError: negative ``tokens``, an unknown shape, or an exponential decay to 0, which takes forever.
    """
    config = optimizer_config
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; a run has trained on 0 tokens or more")
    warmup = config.lr_warmup_tokens if warmup_tokens is None else warmup_tokens
    if config.lr_segments:
        reached = tokens / warmup if tokens < warmup else 1.0
        return reached * _in_segments(tokens, config.lr, parse_segments(config.lr_segments))
    if tokens < warmup:
        return config.lr * tokens / warmup
    decayed = tokens - warmup - config.lr_constant_tokens
    if config.lr_decay_tokens <= 0 or decayed <= 0:
        return config.lr
    if config.lr_decay_style == "exponential" and config.min_lr <= 0:
        raise ValueError(f"optimizer.min_lr is {config.min_lr}; exponential decay needs a value above 0")
    progress = min(1.0, decayed / config.lr_decay_tokens)
    return _between(config.lr, config.min_lr, progress, config.lr_decay_style)


def _in_segments(tokens: int, begin: float, segments: Sequence[Segment]) -> float:
    for segment in segments:
        if tokens < segment.tokens:
            return _between(begin, segment.end, tokens / segment.tokens, segment.shape)
        tokens -= segment.tokens
        begin = segment.end
    return begin


def _between(begin: float, end: float, progress: float, shape: str) -> float:
    """What a shape has reached on its way from ``begin`` to ``end`` after ``progress`` (0 to 1)."""
    match shape:
        case "constant":
            return end
        case "linear":
            return end + (begin - end) * (1.0 - progress)
        case "cosine":
            return end + (begin - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "exponential":
            return begin if begin == end else begin * (end / begin) ** progress
    raise ValueError(f"optimizer.lr_decay_style is {shape!r}; choose linear, cosine or exponential")
