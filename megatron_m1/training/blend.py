"""The weights of a run's corpora as a function of its tokens, over the stages that change them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_m1.config import DataConfig
from megatron_m1.config.epochs import epoch_caps
from megatron_m1.config.schedules import Schedules
from megatron_m1.config.stages import BLEND
from megatron_m1.data.corpora.blend import parse_blend


@dataclass(frozen=True)
class Blends:
    """What a stage's packs are dealt from.

    Where it takes its blend over little by little, the corpora of the one before are its own as well, with a weight of
    0 in the end: what the stream does must not depend on where a run was resumed.
    """

    schedules: Schedules
    by_stage: Mapping[int, Mapping[str, float]]
    """Weights by prefix of the stages that are needed, by index; they sum to 1."""

    @property
    def prefixes(self) -> list[str]:
        """The corpora, in the order of ``weights``."""
        found: dict[str, None] = {}
        for index in sorted(self.by_stage, reverse=True):
            found |= dict.fromkeys(self.by_stage[index])
        return list(found)

    def weights(self, tokens: int) -> Sequence[float]:
        """Return the weight of each of ``prefixes`` for the pack that begins at ``tokens`` of the run."""
        weights = self._weights(self.schedules.index, tokens)
        return [weights.get(prefix, 0.0) for prefix in self.prefixes]

    def _weights(self, index: int, tokens: int) -> Mapping[str, float]:
        stage, own = self.schedules.stages[index], self.by_stage[index]
        span, origin = stage.config.data.train_transition_tokens, stage.origins[BLEND]
        begin = self.schedules.starts[self.schedules.stages[origin].name]
        if not origin or not span or tokens >= begin + span:
            return own
        before = self._weights(origin - 1, begin)
        share = (tokens - begin) / span
        return {
            prefix: (1.0 - share) * before.get(prefix, 0.0) + share * own.get(prefix, 0.0)
            for prefix in {**own, **before}
        }


def open_blends(schedules: Schedules, train: Sequence[str]) -> Blends:
    """Read the blends that a stage needs.

    Args:
        schedules: of the stage.
        train: ``data.train`` of the stage; where a stage before it has none of its own, it has this one as well.

    Raises:
        ValueError: as ``parse_blend``.
        FileNotFoundError: as ``parse_blend``.
    """
    needed: dict[int, Mapping[str, float]] = {}
    spellings: dict[str, str] = {}
    index = schedules.index
    while True:
        stage = schedules.stages[index]
        blend = train if index == schedules.index else stage.config.data.train or train
        prefixes, weights = parse_blend(blend)
        same = [spellings.setdefault(os.path.realpath(prefix), prefix) for prefix in prefixes]
        needed[index] = dict(zip(same, weights, strict=True))
        if not stage.origins[BLEND] or not stage.config.data.train_transition_tokens:
            return Blends(schedules, needed)
        index = stage.origins[BLEND] - 1


def caps_by_prefix(data: DataConfig, prefixes: Sequence[str]) -> dict[str, float]:
    """Return the caps in epochs that ``data.max_epochs`` gives to some of ``prefixes``, whose spelling may differ."""
    caps = epoch_caps(data)
    if isinstance(caps, float):
        return {} if caps == math.inf else dict.fromkeys(prefixes, caps)
    by_place = {os.path.realpath(prefix): cap for prefix, cap in caps.items()}
    places = {prefix: os.path.realpath(prefix) for prefix in prefixes}
    return {prefix: by_place[place] for prefix, place in places.items() if place in by_place}
