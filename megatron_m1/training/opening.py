"""The first lines of a run's log: what runs, where, on what, for how long."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from megatron_m1.config import ResolvedConfig
from megatron_m1.config.schedules import Span
from megatron_m1.data.corpora.blend import parse_blend
from megatron_m1.data.corpora.prefix import check_prefix
from megatron_m1.runtime.mesh import Mesh
from megatron_m1.training.description import (
    LINE_WIDTH,
    Fact,
    batch_facts,
    corpora_facts,
    lines_of,
    mesh_facts,
    model_fact,
    schedule_facts,
    whole_tokens,
)
from megatron_m1.training.progress import Progress


def opening_lines(
    config: ResolvedConfig, mesh: Mesh, progress: Progress, spans: Sequence[Span], *, goes_on: bool = False
) -> list[str]:
    """Describe a run that is about to train, in lines of 80 columns.

    Args:
        config: of the run.
        mesh: its processes.
        progress: where it goes on.
        spans: what is left of it, the present stage first.
        goes_on: after the stage before, with the same processes: no word of these.
    """
    corpora = [check_prefix(prefix) for prefix in parse_blend(config.data.train)[0]]
    processes: list[Fact] = [
        ("versions", _versions()),
        *mesh_facts(config.parallel, mesh.world_size),
        ("devices", _devices(config, mesh)),
        model_fact(config),
    ]
    facts: list[Fact] = [
        *([] if goes_on else processes),
        *corpora_facts(config, corpora, whole_tokens(config)),
        *batch_facts(config, mesh.world_size, spans[0].schedules, tokens=progress.tokens),
        *schedule_facts(config, spans),
        *([] if goes_on else [("folder", str(Path(config.run.folder)))]),
    ]
    return lines_of(facts, width=LINE_WIDTH)


def _versions() -> str:
    ours = ", ".join(f"{name} {metadata.version(name)}" for name in ("megatron-m1", "megatron-core"))
    return f"{ours}, torch {torch.__version__}, python {platform.python_version()}"


def _devices(config: ResolvedConfig, mesh: Mesh) -> str:
    name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    parallel, model = config.parallel, config.model
    return (
        f"{mesh.world_size} x {name} over {parallel.distributed_backend}, {config.train.precision}, "
        f"{model.transformer_impl} modules"
    )
