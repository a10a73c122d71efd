"""Who is in which process group: the two grids that megatron-core lays over the ranks, without torch.

world = PP x DP x CP x TP for everything but the experts, and PP x EDP x EP x ETP for these, whose ranks are the same
ones dealt anew inside each pipeline stage. In both, the last-named axis changes fastest from rank to rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron_m1.config.resolve import check_mesh
from megatron_m1.config.resolved import ResolvedParallelConfig

type Axis = tuple[str, int]


@dataclass(frozen=True)
class Group:
    """One kind of process group."""

    name: str
    """As in the papers: TP, EP ..."""
    shares: str
    """What its ranks have in common or exchange."""
    members: tuple[tuple[int, ...], ...]
    """The ranks of every group of this kind."""


def dense_axes(parallel: ResolvedParallelConfig, world_size: int) -> list[Axis]:
    """The grid of everything but the experts, its fastest axis first."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    stages = parallel.pipeline_model_parallel_size
    return [("TP", tensor), ("CP", context), ("DP", world_size // (tensor * context * stages)), ("PP", stages)]


def expert_axes(parallel: ResolvedParallelConfig, world_size: int) -> list[Axis]:
    """The experts' grid, its fastest axis first."""
    tensor, expert = parallel.expert_tensor_parallel_size, parallel.expert_model_parallel_size
    stages = parallel.pipeline_model_parallel_size
    return [("ETP", tensor), ("EP", expert), ("EDP", world_size // (tensor * expert * stages)), ("PP", stages)]


def place(rank: int, axes: list[Axis]) -> dict[str, int]:
    """A rank's number on each axis."""
    found = {}
    for name, size in axes:
        rank, found[name] = divmod(rank, size)
    return found


def first_group(names: str, parallel: ResolvedParallelConfig, world_size: int) -> tuple[int, ...]:
    """The group of rank 0 over some axes of one grid, of axes named as in ``TP x CP``."""
    wanted = set(names.split(" x "))
    members, stride = [0], 1
    for axis, size in _grid_of(wanted, parallel, world_size):
        if axis in wanted:
            members = [member + step * stride for step in range(size) for member in members]
        stride *= size
    return tuple(members)


def _grid_of(wanted: set[str], parallel: ResolvedParallelConfig, world_size: int) -> list[Axis]:
    grids = (dense_axes(parallel, world_size), expert_axes(parallel, world_size))
    return next(grid for grid in grids if wanted <= {name for name, _ in grid})


def groups_over(names: str, parallel: ResolvedParallelConfig, world_size: int) -> tuple[tuple[int, ...], ...]:
    """The ranks that differ on some axes of one grid only, of axes named as in ``TP x CP``."""
    wanted = set(names.split(" x "))
    axes = _grid_of(wanted, parallel, world_size)
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world_size):
        others = tuple(value for axis, value in place(rank, axes).items() if axis not in wanted)
        found.setdefault(others, []).append(rank)
    return tuple(sorted(map(tuple, found.values())))


SHARES = {
    "TP": "each layer's matrices and heads",
    "CP": "the tokens of a pack",
    "DP": "copies of all but the experts, with other packs",
    "PP": "the layers, one stage each",
    "ETP": "each expert's matrices",
    "EP": "the experts",
    "EDP": "copies of the same experts",
}


def process_groups(parallel: ResolvedParallelConfig, world_size: int) -> list[Group]:
    """Every kind of group, the dense grid's first.

    Raises:
        ValueError: a grid does not tile the world.
    """
    check_mesh(parallel, world_size)
    dense, expert = dense_axes(parallel, world_size), expert_axes(parallel, world_size)
    names = [name for name, _ in [*dense, *expert[:-1]]]
    return [Group(name, SHARES[name], groups_over(name, parallel, world_size)) for name in names]


def spelled(ranks: tuple[int, ...]) -> str:
    """Ranks in few words: ``0-7``, ``0, 8, ..., 56``, or all of a few."""
    steps = {b - a for a, b in pairwise(ranks)}
    if steps == {1}:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) > 4 and len(steps) == 1:
        return f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"
    return ", ".join(map(str, ranks))
