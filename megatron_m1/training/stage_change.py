"""From one stage of a run to the next: which configuration follows, and whether these processes can go on with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_m1.config import ResolvedConfig
from megatron_m1.config.resolve import fitting_world, resolve, resolve_mesh
from megatron_m1.config.schedules import Position
from megatron_m1.config.stages import Stage, stage_at, stages_of
from megatron_m1.runtime.mesh import Mesh
from megatron_m1.training.preflight import build_embedded_corpus, with_own_tokenizer

GROUP_FIELDS = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("distributed_backend", "distributed_timeout_seconds"),
)
"""Fields of ``parallel`` with which process groups are made, once in a process."""


@dataclass(frozen=True)
class Restart:
    """A stage that needs processes of its own."""

    stage: str
    processes: int
    """That it can be started with: as many as now, or the fewest that its mesh needs."""

    def line(self, folder: str) -> str:
        """Say how the run goes on."""
        return (
            f"stage {self.stage} needs another mesh: the run is saved, and goes on with megatron-m1 pretrain "
            f"--run.folder {folder} on {self.processes} processes (--nproc-per-node {self.processes} on one node)"
        )


def next_stage(config: ResolvedConfig, at: Position) -> tuple[Stage, dict[str, int]]:
    """Return the stage in which a run goes on, and the tokens at which each stage up to it began, by name.

    Args:
        config: of any of its stages.
        at: where it is.
    """
    stages = stages_of(config.recipe)
    index, begun = stage_at(stages, at.begun, at.tokens)
    return stages[index], begun


def restart_for(stage: Stage, config: ResolvedConfig, mesh: Mesh) -> Restart | None:
    """Return what a stage needs if these processes can't go on with it.

    Args:
        stage: the one that begins.
        config: with which the process groups were made.
        mesh: the processes.
    """
    processes = fitting_world(mesh.world_size, stage.config.parallel)
    wanted = resolve_mesh(stage.config, has_gpu=mesh.device.type == "cuda")
    same = all(getattr(wanted, name) == getattr(config.parallel, name) for name in GROUP_FIELDS)
    return None if same and processes == mesh.world_size else Restart(stage.name, processes)


def resolved_at(config: ResolvedConfig, mesh: Mesh, at: Position, note: Callable[[str], None]) -> ResolvedConfig:
    """Return the configuration of the stage in which a run goes on, with its data named. Collective.

    Args:
        config: of any of its stages.
        mesh: the processes, with which it can be trained.
        at: where the run is.
        note: shows a line.

    Raises:
        ValueError: as ``resolve``.
    """
    following = resolve(config.recipe, mesh.world_size, has_gpu=mesh.device.type == "cuda", at=at)
    return with_own_tokenizer(build_embedded_corpus(following, note=note), note=note)
