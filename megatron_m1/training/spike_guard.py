"""Which gradient norms are spikes, and when there are too many of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_m1.config.tree import TrainConfig
from megatron_m1.printing import counted, shown


class SpikeError(RuntimeError):
    """The gradient norm had a spike and the run is to stop at one, or had too many. One line."""


@dataclass(frozen=True)
class Spike:
    """A step whose gradient norm was too far above those before it."""

    step: int
    number: int
    """Of the run's spikes, from 1."""
    norm: float
    """Before clipping."""
    median: float
    """Of the norms before it."""
    steps: int
    """Norms that the median is of."""

    def __str__(self) -> str:
        times = f"{self.norm / self.median:.3g} times the median {self.median:.4g}"
        return f"step {self.step}: gradient norm {self.norm:.4g} is {times} of {counted(self.steps, 'step')}"


class SpikeGuard:
    """Judges gradient norms by a running median. Pure logic: fed the same numbers, it decides the same on every rank.

    Args:
        train: its ``spike_guard``, ``spike_factor``, ``spike_window`` and ``max_spikes``.

    Attributes:
        total: spikes of the whole run; going back to a checkpoint does not undo them.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self.total = 0
        self._steps: list[int] = []
        self._norms: list[float] = []

    @property
    def is_on(self) -> bool:
        """Whether norms are judged at all."""
        return self._train.spike_guard != "off"

    @property
    def applies_spikes(self) -> bool:
        """Whether a spiking step is applied all the same."""
        return self._train.spike_guard == "count"

    def judge(self, step: int, norm: float) -> Spike | None:
        """Take the gradient norm of ``step`` into account, and tell whether it is a spike.

        Spikes do not enter the median, nor does a norm of 0 (a batch in which nothing is predicted) or one that is not
        finite, which is no spike: such steps are skipped and counted elsewhere.

        Args:
            step: number of the step; lower than the one before after the run has gone back.
            norm: global norm before clipping, the same on every rank.
        """
        train, norms = self._train, self._norms
        if not self.is_on or norm == 0 or not math.isfinite(norm):
            return None
        if 2 * len(norms) >= train.spike_window and norm > train.spike_factor * statistics.median(norms):
            self.total += 1
            self._steps = [*(s for s in self._steps if s > step - train.spike_window), step]
            return Spike(step, self.total, norm, statistics.median(norms), len(norms))
        norms.append(norm)
        del norms[: -train.spike_window]
        return None

    def end_of_run(self, spike: Spike) -> str | None:
        """Say why the run ends with ``spike``, the last one that ``judge`` has found; None if it goes on.

        Spikes count as long as they are less than ``spike_window`` steps behind the last one. One that lies ahead,
        because the run has gone back since, counts as well: a run that goes back again and again comes to its end.
        """
        train = self._train
        remedy = (
            "lower optimizer.lr, take a longer warm-up or smaller steps in length, or restart from an earlier "
            "checkpoint with train.spike_guard rollback"
        )
        if train.spike_guard == "stop":
            return f"{spike}, and train.spike_guard is stop: {remedy}"
        if train.max_spikes and len(self._steps) >= train.max_spikes:
            many = counted(len(self._steps), "spike")
            return f"{spike}: {many} within {train.spike_window} steps (train.max_spikes): {remedy}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what the next decision depends on, for the checkpoint: JSON-able, and small."""
        return {"total": self.total, "steps": list(self._steps), "norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint; empty is that of a new run, or of a run of before there were guards."""
        if state:
            self.total, self._steps = state["total"], list(state["steps"])
        self.go_back(state)

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Take the norms of an earlier state and keep the count of spikes."""
        self._norms = list(state.get("norms", []))[-self._train.spike_window :]


def checked_state(state: object) -> dict[str, Any]:
    """Return a checkpoint's state of a guard if it is one.

    Raises:
        ValueError: it is not; one line that begins with the value.
    """
    if state == {} or (isinstance(state, dict) and state.keys() == {"total", "steps", "norms"} and _is_state(**state)):
        return state
    raise ValueError(f"{shown(state)}, which is no state of a spike guard")


def _is_state(total: object, steps: object, norms: object) -> bool:
    if not isinstance(steps, list) or not isinstance(norms, list):
        return False
    are_counts = all(type(count) is int and 0 <= count < 1 << 63 for count in (total, *steps))
    return are_counts and all(type(norm) is float and 0 < norm < math.inf for norm in norms)
