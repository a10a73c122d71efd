"""One rank asks, all compute: rank 0 runs a program that knows of no mesh, the others wait for what it wants scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed as dist

from megatron_m1.evaluation.model import EvaluatedModel
from megatron_m1.evaluation.scores import Sums
from megatron_m1.evaluation.sequences import Scored, score
from megatron_m1.runtime.watchdog import is_collective_error


def lead(model: EvaluatedModel, sequences: list[Scored], advance: Callable[[int], None]) -> Sums:
    """Score sequences on all ranks; rank 0 calls it, within ``leading``. Arguments are those of ``score``."""
    dist.broadcast_object_list([sequences], src=0)
    return score(model, sequences, advance)


def follow(model: EvaluatedModel) -> None:
    """Compute on a rank other than 0 what its lm-eval asks for, until it has what it wants.

    Raises:
        ValueError: rank 0 has failed.
    """
    while True:
        asked: list[Any] = [None]
        dist.broadcast_object_list(asked, src=0)
        if asked[0] is None:
            return
        if isinstance(asked[0], ValueError):
            raise asked[0]
        score(model, asked[0], lambda done: None)


@contextmanager
def leading() -> Iterator[None]:
    """Let the ranks in ``follow`` go at the end of the block, with the block's error if there is one."""
    try:
        yield
    except Exception as error:
        # After a failed collective they know, and another one would not come to its end.
        if not is_collective_error(error):
            words = (
                str(error) if isinstance(error, ValueError) else f"rank 0 has failed: {type(error).__name__}: {error}"
            )
            dist.broadcast_object_list([ValueError(words)], src=0)
        raise
    else:
        dist.broadcast_object_list([None], src=0)
