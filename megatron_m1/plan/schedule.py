"""megatron-core's pipeline schedules: which micro-batches are under way, and how long ranks wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_m1.config.pipeline import Stages


def passes(ranks: int, rank: int, chunks: int, micro_batches: int) -> Iterator[tuple[bool, int]]:
    """What one pipeline rank does in a step, in order: whether it is a forward pass, and of which of its chunks.

    Without interleaving (one chunk), 1F1B; with it, interleaved 1F1B in groups of as many micro-batches as ranks.

    Args:
        ranks: pipeline stages.
        rank: this one.
        chunks: virtual stages of a rank.
        micro_batches: of one rank and step.
    """
    if chunks == 1:
        warm_up = ranks - rank - 1
        order = [0] * micro_batches
    else:
        warm_up = 2 * (ranks - rank - 1) + (chunks - 1) * ranks
        groups = [min(ranks, micro_batches - first) for first in range(0, micro_batches, ranks)]
        order = [chunk for size in groups for chunk in range(chunks) for _ in range(size)]
    warm_up = min(warm_up, len(order))
    backward = iter([chunks - 1 - chunk for chunk in order])
    for place, chunk in enumerate(order):
        yield True, chunk
        if place >= warm_up:
            yield False, next(backward)
    for chunk in backward:
        yield False, chunk


def most_kept(kept: Sequence[int], ranks: int, rank: int, micro_batches: int) -> tuple[int, tuple[int, ...]]:
    """Most bytes that a rank keeps at a time, and how many micro-batches of each chunk these are of.

    Args:
        kept: of each of the rank's chunks, bytes of one micro-batch.
        ranks: pipeline stages.
        rank: this one.
        micro_batches: of one rank and step.
    """
    under_way, now = [0] * len(kept), 0
    most, then = 0, tuple(under_way)
    for is_forward, chunk in passes(ranks, rank, len(kept), micro_batches):
        under_way[chunk] += 1 if is_forward else -1
        now += kept[chunk] if is_forward else -kept[chunk]
        if now > most:
            most, then = now, tuple(under_way)
    return most, then


def bubble(stages: Stages, weights: Sequence[Sequence[float]], micro_batches: int) -> float:
    """Share of a step in which the busiest pipeline rank waits for others.

    A rank with the work w_r in each micro-batch works m w_r; until the pipeline is full and while it runs empty, all
    others' work of one micro-batch passes by, of one chunk where stages are interleaved.

    Args:
        stages: the layout.
        weights: ``weights[rank][virtual stage]``, time of forward and backward of one micro-batch.
        micro_batches: of one rank and step.
    """
    totals = [sum(chunks) for chunks in weights]
    busiest = max(totals)
    if busiest == 0:
        return 0.0
    waiting = (sum(totals) - busiest) / stages.chunks_per_rank
    return waiting / (waiting + micro_batches * busiest)
