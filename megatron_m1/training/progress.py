"""How far a run is: what its checkpoints hold besides tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint.contents import complete_checkpoints
from megatron_m1.checkpoint.folder import STATE, read_state, step_of
from megatron_m1.config import Config
from megatron_m1.config.schedules import START, Position
from megatron_m1.printing import shown
from megatron_m1.training.spike_guard import checked_state


@dataclass
class Progress:
    """What a checkpoint holds besides tensors, the same on every rank."""

    step: int = 0
    tokens: int = 0
    consumed_samples: int = 0
    skipped_total: int = 0
    skipped_in_row: int = 0
    stages: dict[str, int] = field(default_factory=dict)
    """Tokens at which each stage up to this one began, by name and in order."""
    stream: dict[str, Any] | None = None
    """Where the data go on, as their stream says; None where it has not begun."""
    spike_guard: dict[str, Any] = field(default_factory=dict)
    """``SpikeGuard.state_dict``."""

    @property
    def position(self) -> Position:
        """How far the run is."""
        return Position(self.step, self.tokens, self.stages)

    @property
    def begins_stage(self) -> bool:
        """Whether the next step is the first one of a stage that is not the first."""
        return len(self.stages) > 1 and list(self.stages.values())[-1] == self.tokens


COUNTS = tuple(entry.name for entry in fields(Progress) if entry.type == "int")
LATER = ("stages", "stream", "spike_guard")
"""What checkpoints of older versions lack."""
EARLIER = ("train_samples",)
"""What they have besides."""


def stored_progress(state: Mapping[str, Any]) -> Progress:
    """Read what a checkpoint's ``state.json`` says.

    Raises:
        ValueError: it has other names than a run's, or a value that is no count.
    """
    odd = (state.keys() ^ set(COUNTS)) - {*LATER, *EARLIER}
    if odd:
        names = ", ".join(shown(name) for name in sorted(odd)[:4])
        raise ValueError(f"{STATE} of the checkpoint lacks, or has besides what a run has: {names}")
    for name in (*COUNTS, *EARLIER):
        _check_count(name, state.get(name, 0))
    stream = state.get("stream")
    if not isinstance(stream, dict | None):
        raise ValueError(f"{STATE} of the checkpoint has stream = {shown(stream)}, which is no state of a stream")
    try:
        spike_guard = checked_state(state.get("spike_guard", {}))
    except ValueError as error:
        raise ValueError(f"{STATE} of the checkpoint has spike_guard = {error}") from error
    counts = {name: state[name] for name in COUNTS}
    return Progress(**counts, stages=_stored_stages(state), stream=stream, spike_guard=spike_guard)


def _stored_stages(state: Mapping[str, Any]) -> dict[str, int]:
    stages = state.get("stages", {})
    if not isinstance(stages, dict):
        raise ValueError(f"{STATE} of the checkpoint has stages = {shown(stages)}, which are no stages")
    for name, tokens in stages.items():
        _check_count(f"stages {shown(name)}", tokens)
    return stages


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{STATE} of the checkpoint has {name} = {shown(value)}, which is no count")


def stored_position(config: Config) -> Position:
    """Return how far the newest checkpoint of ``run.folder`` is, from its ``state.json`` alone; writes nothing.

    The beginning, where there is none, the run may not go on, or that file can't be read, as of a damaged checkpoint,
    which is passed over when it is loaded.
    """
    newest = next(iter(complete_checkpoints(Path(config.run.folder))), None) if config.run.resume else None
    if newest is None:
        return START
    try:
        state = read_state(newest)
        stages = _stored_stages(state)
        _check_count("tokens", state.get("tokens"))
    except ValueError:
        return START
    return Position(step_of(newest), state["tokens"], stages)
