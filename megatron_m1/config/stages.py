"""What each stage of a run trains with: its own settings over those of the stages before it, and where schedules begin.

A run without stages has one, which lasts for ``train.max_steps``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_m1.config.stage_list import value_at
from megatron_m1.config.tree import Config, StageConfig

LR, BATCH, CLIP, AUX, BLEND = "lr", "batch", "clip", "aux", "blend"
_SPANS = ("optimizer.lr_constant_tokens", "optimizer.lr_decay_tokens", "optimizer.lr_decay_style")
SCHEDULES: dict[str, tuple[str, ...]] = {
    LR: (
        *("optimizer.lr", "optimizer.min_lr", "optimizer.lr_warmup_tokens", "optimizer.lr_warmup_steps"),
        *(*_SPANS, "optimizer.lr_segments"),
    ),
    BATCH: ("train.global_batch_size", "train.global_batch_size_schedule"),
    CLIP: ("optimizer.clip_grad", "optimizer.clip_grad_schedule"),
    AUX: ("model.moe_aux_loss_coeff", "train.moe_aux_loss_coeff_schedule"),
    BLEND: ("data.train",),
}
"""Schedules in tokens, and the fields with which a stage begins one anew."""
FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (_SPANS, ("optimizer.lr_segments",)),
    (("optimizer.lr_warmup_tokens",), ("optimizer.lr_warmup_steps",)),
    *((names[:1], names[1:]) for name, names in SCHEDULES.items() if name in (BATCH, CLIP, AUX)),
)
"""Two ways to say the same: a stage that names one of them does not inherit the other."""
WARM_UP = ("optimizer.lr_warmup_tokens", "optimizer.lr_warmup_steps")
"""A stage that begins a schedule of the learning rate has no other warm-up than its own."""
NOT_INHERITED = "optimizer.lr_may_jump"
"""Every stage says it for its own beginning."""


@dataclass(frozen=True)
class Stage:
    """One stage, with everything that it inherits."""

    index: int
    name: str
    """Empty for the only one of a run without stages."""
    tokens: int | None
    """That it trains on; None without stages."""
    end: int | None
    """Sum of the tokens of the stages up to this one: as soon as the run has trained on so many, the next begins."""
    config: Config
    """The run's tree as it is in this stage; ``stages`` are still all of them."""
    origins: Mapping[str, int]
    """By name of ``SCHEDULES``: the index of the stage that last named one of its fields, 0 for the run's own."""

    @property
    def nominal_start(self) -> int:
        """Tokens of the stages before it; its first step begins less than a batch later."""
        return (self.end or 0) - (self.tokens or 0)


def stages_of(config: Config) -> list[Stage]:
    """Return the stages of a run, in their order.

    Args:
        config: as read.
    """
    listed: Sequence[StageConfig] = config.stages
    if not listed:
        return [Stage(0, "", None, None, config, dict.fromkeys(SCHEDULES, 0))]
    found: list[Stage] = []
    tree, origins, end = config, dict.fromkeys(SCHEDULES, 0), 0
    for index, stage in enumerate(listed):
        tree = _laid_over(tree, stage, value_at(config, NOT_INHERITED))
        origins = origins | {
            name: index for name, fields in SCHEDULES.items() if any(field in stage.settings for field in fields)
        }
        end += stage.tokens
        found.append(Stage(index, stage.name, stage.tokens, end, tree, origins))
    return found


def _laid_over(before: Config, stage: StageConfig, may_jump: bool) -> Config:
    tree = copy.deepcopy(before)
    _set(tree, NOT_INHERITED, may_jump)
    for forms in FORMS:
        for own, other in (forms, forms[::-1]):
            if any(path in stage.settings for path in own) and not any(path in stage.settings for path in other):
                for path in other:
                    _set(tree, path, value_at(Config(), path))
    if any(path in stage.settings for path in SCHEDULES[LR]):
        for path in WARM_UP:
            _set(tree, path, 0)
    for path, value in stage.settings.items():
        _set(tree, path, copy.deepcopy(value))
    return tree


def _set(tree: Config, path: str, value: Any) -> None:
    group, _, name = path.partition(".")
    setattr(getattr(tree, group), name, value)


def stage_at(stages: Sequence[Stage], begun: Mapping[str, int], tokens: int) -> tuple[int, dict[str, int]]:
    """Return the stage in which a run goes on, and the tokens at which each stage up to it began.

    Args:
        stages: of the run.
        begun: tokens at which stages began, by name and in order, as a checkpoint has them; empty at the beginning of a
            run, and for a checkpoint that knows of no stages.
        tokens: of the run so far.

    Raises:
        ValueError: the checkpoint is in a stage that the run does not have; one line.
    """
    known = {stage.name: stage.index for stage in stages}
    if not (stages[0].name and any(begun)):
        # Neither has stages, or one of them has none: they count on from the beginning.
        index, begun = 0, {stages[0].name: 0}
    else:
        last = list(begun)[-1]
        if last not in known:
            raise ValueError(
                f"the newest checkpoint is in stage {last}, which is none of the run's ({', '.join(known)}): keep the "
                "names of the stages, or choose another run.folder"
            )
        index = known[last]
    starts = {stage.name: begun.get(stage.name, stage.nominal_start) for stage in stages[: index + 1]}
    while (end := stages[index].end) is not None and tokens >= end and index + 1 < len(stages):
        index += 1
        starts[stages[index].name] = tokens
    return index, starts
