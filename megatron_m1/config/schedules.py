"""What changes within a run, as functions of its tokens: learning rate, batch, clipping, aux coefficient; its steps.

Schedules count tokens from the start of the stage that last named one of their fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_m1.config.lr import learning_rate
from megatron_m1.config.points import next_change, on_lines, on_steps
from megatron_m1.config.stages import AUX, BATCH, CLIP, LR, Stage, stage_at, stages_of
from megatron_m1.config.tree import Config

DEFAULT_STEPS = 1000
"""Of a run that has neither stages nor ``train.max_steps``."""


@dataclass(frozen=True)
class Position:
    """How far a run is, as a checkpoint says; nothing is the beginning."""

    step: int = 0
    tokens: int = 0
    begun: Mapping[str, int] = field(default_factory=dict)
    """Tokens at which stages began, by name and in order."""


START = Position()


@dataclass(frozen=True)
class Schedules:
    """The schedules of one stage. Tokens are those of the run."""

    stages: tuple[Stage, ...]
    """Of the run."""
    index: int
    """Of the stage."""
    starts: Mapping[str, int]
    """Tokens at which the stages up to this one began, by name."""

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.stages[self.index]

    def origin(self, schedule: str) -> int:
        """Tokens at which a schedule of ``stages.SCHEDULES`` began."""
        return self.starts[self.stages[self.stage.origins[schedule]].name]

    @property
    def warmup_tokens(self) -> int:
        """Tokens of the learning rate's warm-up, also where it is given in steps."""
        optimizer = self.stage.config.optimizer
        if not optimizer.lr_warmup_steps:
            return optimizer.lr_warmup_tokens
        first = Schedules(self.stages, self.stage.origins[LR], self.starts)
        begin = self.origin(LR)
        return first.advance(begin, 0, last_step=optimizer.lr_warmup_steps)[0] - begin

    def learning_rate(self, tokens: int) -> float:
        """Return the rate of the step that ends at ``tokens``."""
        config = self.stage.config.optimizer
        return learning_rate(tokens - self.origin(LR), config, warmup_tokens=self.warmup_tokens)

    def clip_grad(self, tokens: int) -> float:
        """Return the norm above which the gradients of the step that ends at ``tokens`` are scaled down."""
        config = self.stage.config.optimizer
        points = config.clip_grad_schedule
        return on_lines(points, tokens - self.origin(CLIP)) if points else config.clip_grad

    def aux_loss_coefficient(self, tokens: int) -> float:
        """Return the weight of the load-balancing loss in the step that ends at ``tokens``."""
        config = self.stage.config
        points = config.train.moe_aux_loss_coeff_schedule
        return on_lines(points, tokens - self.origin(AUX)) if points else config.model.moe_aux_loss_coeff

    def packs(self, tokens: int) -> int:
        """Return the packs of the step that begins at ``tokens``."""
        train = self.stage.config.train
        points = train.global_batch_size_schedule
        return int(on_steps(points, tokens - self.origin(BATCH))) if points else train.global_batch_size

    def step_tokens(self, tokens: int) -> int:
        """Return the tokens of the step that begins at ``tokens``, without what pads the packs' ends."""
        return self.packs(tokens) * self.stage.config.data.seq_length

    def advance(self, tokens: int, step: int, *, end: float = math.inf, last_step: float = math.inf) -> tuple[int, int]:
        """Return tokens and step after training on from ``tokens`` and ``step`` until one of them is reached.

        Args:
            tokens: of the run.
            step: the last one done.
            end: tokens; passed by less than a batch.
            last_step: exact. One of both must be given.
        """
        points, origin = self.stage.config.train.global_batch_size_schedule, self.origin(BATCH)
        while tokens < end and step < last_step:
            size = self.step_tokens(tokens)
            limit = min(end, origin + next_change(points, tokens - origin))
            steps = min(math.inf if limit == math.inf else -(-(math.ceil(limit) - tokens) // size), last_step - step)
            assert steps != math.inf
            tokens, step = tokens + int(steps) * size, step + int(steps)
        return tokens, step


@dataclass(frozen=True)
class Span:
    """What is left of one stage."""

    schedules: Schedules
    first_step: int
    last_step: int
    tokens: int
    """Of the run, where it begins."""
    end: int
    """Of the run, after its last step."""

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.schedules.stage


def course(config: Config, at: Position = START) -> list[Span]:
    """Return the stages that are left of a run, those without a step left out; nothing if it has come to its end.

    Args:
        config: of the whole run, as read.
        at: where it goes on.

    Raises:
        ValueError: see ``stage_at``.
    """
    stages = tuple(stages_of(config))
    tokens, step = at.tokens, at.step
    index, starts = stage_at(stages, at.begun, tokens)
    last = last_step_of(config)
    spans = []
    while True:
        schedules = Schedules(stages, index, dict(starts))
        end = schedules.stage.end
        began = (tokens, step)
        tokens, step = schedules.advance(tokens, step, end=math.inf if end is None else end, last_step=last)
        if step > began[1]:
            spans.append(Span(schedules, began[1] + 1, step, began[0], tokens))
        if end is None or tokens < end or index + 1 == len(stages):
            return spans
        index += 1
        starts[stages[index].name] = tokens


def last_step_of(config: Config) -> float:
    """Return the step at which a run ends whatever its stages are; infinite if these alone say so."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    return math.inf if config.stages else DEFAULT_STEPS


def schedules_at(config: Config, at: Position = START) -> Schedules:
    """Return the schedules of the stage in which a run goes on."""
    stages = tuple(stages_of(config))
    return Schedules(stages, *stage_at(stages, at.begun, at.tokens))
