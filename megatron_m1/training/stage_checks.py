"""What the stages of a run need from the file system, all of them before the first one starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from megatron_m1.config import ResolvedConfig
from megatron_m1.config.epochs import epoch_caps
from megatron_m1.config.schedules import course
from megatron_m1.config.stages import stages_of
from megatron_m1.data.corpora.blend import parse_blend
from megatron_m1.data.corpora.prefix import check_prefix
from megatron_m1.training.blend import caps_by_prefix
from megatron_m1.training.preflight import check_data


def check_later_stages(stages: Sequence[ResolvedConfig], *, only_plan: bool = False) -> list[str]:
    """Check the corpora of the stages to come as ``check_data`` does.

    Args:
        stages: resolved, the present one first.
        only_plan: as of ``check_data``.

    Returns:
        Lines that the user should read, each once.

    Raises:
        ValueError: with one line that names the stage, the file or value, and the fix.
    """
    notes: dict[str, None] = {}
    checked = {_blends(stages[0])}
    for config in stages[1:]:
        if _blends(config) not in checked:
            checked.add(_blends(config))
            with _of_stage(config):
                notes |= dict.fromkeys(check_data(config, only_plan=only_plan).notes)
    return list(notes)


def _blends(config: ResolvedConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(config.data.train), tuple(config.data.validation)


@contextmanager
def _of_stage(config: ResolvedConfig) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {config.stages[config.stage].name}: {error}") from error


def check_epochs(config: ResolvedConfig) -> None:
    """Check that ``data.max_epochs`` names corpora of the run, and leaves each stage as many tokens as it trains on.

    Args:
        config: of any stage, its data filled in; all stages are looked at.

    Raises:
        ValueError: with one line that names the stage, the tokens and the fix.
    """
    stages = stages_of(config.recipe)
    if not any(stage.config.data.max_epochs for stage in stages):
        return
    blends = [dict(zip(*parse_blend(stage.config.data.train or config.data.train), strict=True)) for stage in stages]
    known = {os.path.realpath(prefix) for blend in blends for prefix in blend}
    used: dict[str, float] = {}
    for stage, blend in zip(stages, blends, strict=True):
        caps = epoch_caps(stage.config.data)
        for prefix in caps if isinstance(caps, dict) else ():
            if os.path.realpath(prefix) not in known:
                raise ValueError(f"data.max_epochs names {prefix}, which is in no blend of the run: correct its path")
        tokens = stage.tokens if stage.tokens is not None else course(config.recipe)[-1].end
        left = _dealt(blend, caps_by_prefix(stage.config.data, list(blend)), float(tokens), used)
        if left >= 1.0:
            where = f"stage {stage.name}: " if stage.name else ""
            raise ValueError(
                f"{where}data.max_epochs lets data.train give {tokens - left:,.0f} of {tokens:,} tokens: raise it, add "
                "a corpus, or train fewer tokens"
            )


def _dealt(blend: Mapping[str, float], caps: Mapping[str, float], tokens: float, used: dict[str, float]) -> float:
    """Add to ``used`` what each corpus gives of ``tokens``, and return what none of them may give any more."""
    room = {
        prefix: caps[prefix] * check_prefix(prefix).tokens - used.get(os.path.realpath(prefix), 0.0)
        if prefix in caps
        else float("inf")
        for prefix in blend
    }
    while tokens >= 1.0:
        shares = {prefix: weight for prefix, weight in blend.items() if room[prefix] >= 1.0}
        if not shares:
            return tokens
        total = sum(shares.values())
        part = min(tokens, *(room[prefix] * total / weight for prefix, weight in shares.items()))
        for prefix, weight in shares.items():
            given = part * weight / total
            room[prefix] -= given
            place = os.path.realpath(prefix)
            used[place] = used.get(place, 0.0) + given
        tokens -= part
    return 0.0
