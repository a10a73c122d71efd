"""What a step takes: memory on every rank, seconds by part, the batch's FLOPs; told to all ranks in one all-reduce."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
from torch import distributed as dist

from megatron_m1.runtime.mesh import Mesh
from megatron_m1.training.figures import Figure

MEMORY_PEAK = Figure("memory_peak_gib", "memory {:.2f} GiB", short="{:.1f} GiB", importance=3)
"""The most that a rank has held at a time since it started, of the rank with the most; see ``memory_peak``."""
MEMORY_PEAK_RANK = Figure("memory_peak_rank", "")
"""That rank; the first of several."""
MEMORY_PEAK_LEAST = Figure("memory_peak_least_gib", "")
"""The same of the rank with the least."""
DATA_SECONDS = Figure("data_seconds", "")
"""Until the slowest rank had its packs. In ``FORWARD_BACKWARD_SECONDS`` the others wait for it."""
FORWARD_BACKWARD_SECONDS = Figure("forward_backward_seconds", "")
"""Rank 0's, with all communication of gradients and until the loss was known."""
OPTIMIZER_SECONDS = Figure("optimizer_seconds", "")
"""Rank 0's: gradient norm, clipping, update, and the gathering of parameters unless that overlaps the next step."""
SAVE_SECONDS = Figure("save_seconds", "")
"""Rank 0's, of the checkpoints since the record before; 0 without. Of one in the background what training waited."""


def memory_peak(device: torch.device) -> int:
    """Bytes that this process has held at a time: on a GPU in torch's allocator there, on a CPU in all (resident)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Taken:
    """The same on every rank."""

    flops: float
    """Useful ones of forward and backward over the global batch."""
    figures: dict[Figure, float]
    """Of memory, and DATA_SECONDS."""


def share(mesh: Mesh, flops: float, data_seconds: float) -> Taken:
    """Tell all ranks what each has taken. Collective: one all-reduce of 8 + 16 bytes a rank (32 KiB of 2,048 ranks).

    Args:
        mesh: of the run.
        flops: useful ones of this rank's packs, on all the ranks that share them.
        data_seconds: until this rank had its packs.
    """
    places = torch.zeros(1 + 2 * mesh.world_size, dtype=torch.float64, device=mesh.device)
    # Of the ranks that share packs, one counts them.
    if mesh.counts_loss and mesh.groups.cp.rank() == 0:
        places[0] = flops
    places[1 + 2 * mesh.rank] = memory_peak(mesh.device)
    places[2 + 2 * mesh.rank] = data_seconds
    dist.all_reduce(places)
    total, *rest = places.tolist()
    memory, seconds = rest[::2], rest[1::2]
    figures = {
        MEMORY_PEAK: max(memory) / 2**30,
        MEMORY_PEAK_RANK: memory.index(max(memory)),
        MEMORY_PEAK_LEAST: min(memory) / 2**30,
        DATA_SECONDS: max(seconds),
    }
    return Taken(total, figures)
