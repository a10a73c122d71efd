"""What really goes through the process groups in a step: bytes by group, collective and rank."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_m1.config import Config
from megatron_m1.training.step import train_step
from tests.model.meshes import my_share, packs, start

OPERATIONS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "send": "send",
}


class Messages(TorchDispatchMode):
    """Bytes of whole messages: of all ranks' parts where they are gathered or scattered, of what a rank sends else."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in ("recv_", "barrier", "monitored_barrier_"):
            return
        tensors = [sum(t.nbytes for t in tree_leaves(value) if isinstance(t, Tensor)) for value in args[:2]]
        group = next(dist.ProcessGroup.unbox(value) for value in args if isinstance(value, torch.ScriptObject))
        size = tensors[1] if name == "alltoall_base_" else max(tensors)
        self.counts[group.group_name, OPERATIONS[name]] += size


GROUPS = {
    "tp": "TP", "cp": "CP", "dp": "DP", "dp_cp": "DP x CP", "pp": "PP", "ep": "EP", "expt_tp": "ETP", "expt_dp": "EDP",
    "tp_ep": "EP x ETP", "tp_cp": "TP x CP", "tp_dp_cp": "TP x DP x CP", "mp": "TP x PP", "tp_ep_pp": "EP x ETP x PP",
}  # fmt: skip


def counted_messages(
    rank: int, world_size: int, config: Config, documents: list[list[int]]
) -> dict[tuple[str, str], int]:
    """Of the second of two steps, by group and kind; a group of one rank has no messages."""
    trained = start(config, world_size)
    batch = my_share(trained, packs(vocab=config.model.vocab_size, documents=documents))
    train_step(trained, batch, lr=0.0)
    with Messages() as messages:
        train_step(trained, batch, lr=0.0)
    world = dist.group.WORLD
    assert world is not None
    names, sizes = {world.group_name: "world"}, {world.group_name: world_size}
    for field, name in GROUPS.items():
        group = getattr(trained.mesh.groups, field, None)
        if group is not None:
            names.setdefault(group.group_name, name)
            sizes[group.group_name] = group.size()
    found: Counter[tuple[str, str]] = Counter()
    for (group, kind), size in messages.counts.items():
        name = names.get(group, "norms")
        if kind == "send" and name == "world":
            name = "PP"  # megatron-core's second group of two stages
        if name == "ETP" and kind == "all-reduce":
            kind = "reduce-scatter"  # which gloo has not: ``runtime.cpu`` adds everything up
        # A few numbers that are reported, or by which gradients are scaled.
        is_report = name in ("world", "norms") or (name == "DP" and kind == "all-reduce")
        if sizes.get(group, 2) > 1 and not is_report:
            found[name, kind] += size
    return dict(found)
