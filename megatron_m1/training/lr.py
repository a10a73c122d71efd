"""The learning rate as a function of the tokens trained on: warm-up, constant, decay."""

from __future__ import annotations

import math

from megatron_m1.config import OptimizerConfig


def learning_rate(tokens: int, optimizer_config: OptimizerConfig) -> float:
    """Return the learning rate of the optimizer step that ends at ``tokens``.

    Linear warm-up from 0 over ``lr_warmup_tokens``, ``lr`` for ``lr_constant_tokens``, then ``lr_decay_style`` from
    ``lr`` to ``min_lr`` over ``lr_decay_tokens``, then ``min_lr``. Without decay tokens it stays at ``lr``.

    Args:
        tokens: tokens of the run up to and including this step's global batch, so that the first step is not lost
            to a rate of 0.
        optimizer_config: ``lr``, ``min_lr``, the three spans in tokens and ``lr_decay_style``.

    Raises:
        ValueError: negative ``tokens``, an unknown decay style, or an exponential decay to 0, which takes forever.
    """
    config = optimizer_config
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; a run has trained on 0 tokens or more")
    if tokens < config.lr_warmup_tokens:
        return config.lr * tokens / config.lr_warmup_tokens
    decayed = tokens - config.lr_warmup_tokens - config.lr_constant_tokens
    if config.lr_decay_tokens <= 0 or decayed <= 0:
        return config.lr
    progress = min(1.0, decayed / config.lr_decay_tokens)
    return config.min_lr + (config.lr - config.min_lr) * _remaining(progress, config)


def _remaining(progress: float, config: OptimizerConfig) -> float:
    """Share of ``lr - min_lr`` that is left after ``progress`` (0 to 1) of the decay."""
    match config.lr_decay_style:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "exponential":
            if config.min_lr <= 0:
                raise ValueError(f"optimizer.min_lr is {config.min_lr}; exponential decay needs a value above 0")
            if config.min_lr == config.lr:
                return 0.0
            return (config.lr * (config.min_lr / config.lr) ** progress - config.min_lr) / (config.lr - config.min_lr)
    raise ValueError(f"optimizer.lr_decay_style is {config.lr_decay_style!r}; choose linear, cosine or exponential")
