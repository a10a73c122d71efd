"""What a checkpoint holds of a trainer: every mesh writes the same tensors under the same names."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_m1.checkpoint.metadata import only_tensors, read_metadata
from megatron_m1.runtime.mesh import Mesh


class Trained(Protocol):
    """What a checkpoint is made of and loaded into: a rank's share of a model that is being trained."""

    mesh: Mesh
    chunks: list[DistributedDataParallel]
    """Pipeline chunks of this rank, as megatron-core wraps them."""
    optimizer: ChainedOptimizer

    def heartbeat(self) -> None:
        """Called before what takes long, so that nobody takes it for a hang."""


def _metadata(trainer: Trained) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gather optimizer state in host memory. The other way puts whole gradient buckets on the GPU, and without
        # overlap_grad_reduce a bucket is the whole model.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,
        "dp_cp_group": trainer.mesh.groups.dp_cp,
    }


def model_state(trainer: Trained) -> dict[str, Any]:
    """Sharded state dict of this rank's chunks, by chunk."""
    return {
        f"model{index}": chunk.module.sharded_state_dict(metadata=_metadata(trainer))
        for index, chunk in enumerate(trainer.chunks)
    }


def _allocate(part: DistributedOptimizer) -> None:
    """Give a part that has not stepped yet the state that it would begin with: zeros."""
    if part.optimizer.state:
        return
    part.load_state_dict(part.state_dict())
    for state in part.optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()


def _adam_step(optimizer: ChainedOptimizer) -> int:
    steps = {group["step"] for group in optimizer.param_groups if group["params"] and "step" in group}
    assert len(steps) <= 1, steps
    return int(steps.pop()) if steps else 0


def _optimizer_state(trainer: Trained, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    # Parameter groups differ between meshes, and their settings come from the configuration: only tensors and the step
    # are kept. On save the first data-parallel rank holds them all, and the others none.
    parts = {}
    for index, part in enumerate(trainer.optimizer.chained_optimizers):
        if not is_loading:
            _allocate(part)
        # Not part.sharded_state_dict, which adds a garbage collection of up to a second.
        tensors = part.sharded_param_state_fully_reshardable(model, is_loading, _metadata(trainer))
        if tensors is not None:
            parts[f"optimizer{index}"] = tensors
    return parts


def _stays_shared(tensor: torch.Tensor) -> bool:
    """Whether megatron-core would write from the parameter's own memory: it copies from a GPU and what is a view."""
    return tensor.is_cpu and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def train_state(trainer: Trained, *, detached: bool) -> dict[str, Any]:
    """Everything to save: parameters, optimizer state and the optimizer's step count. Collective.

    Args:
        trainer: what is trained.
        detached: parameters are copied, so that training may go on while they are written. (Optimizer state always is.)
    """
    for chunk in trainer.chunks:
        if chunk.ddp_config.overlap_param_gather:
            # Updated parameters would reach the other ranks with the next forward pass only.
            chunk.start_param_sync(force_sync=True)
    model = model_state(trainer)
    with torch.no_grad():
        optimizer = _optimizer_state(trainer, model, is_loading=False)
    if detached:
        for entry in nested_values(model):
            if isinstance(entry, ShardedTensor) and entry.data is not None and _stays_shared(entry.data):
                entry.data = entry.data.detach().clone()
    return {**model, **optimizer, "optimizer_step": _adam_step(trainer.optimizer)}


def _read(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    # Every rank reads for itself: megatron-core's parallel load holds all of the optimizer state on the GPU. A tensor
    # asked for must be there; megatron-core 0.19 has stricter checks, but they fail with torch 2.15, whose
    # TensorProperties have one more field.
    with warnings.catch_warnings():
        # The warnings are about arguments that megatron-core passes to torch: who trains can't change them.
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
        # megatron-core unpickles the metadata without looking at it, so what it names is checked here first.
        read_metadata(folder)
        try:
            with only_tensors():
                return dist_checkpointing.load(wanted, str(folder))
        except CheckpointException as error:
            causes = [str(cause) for cause, _ in error.failures.values() if isinstance(cause, pickle.UnpicklingError)]
            if not causes:
                raise
            wanted_name = re.search(r"GLOBAL (\S+)", causes[0])
            raise ValueError(
                f"checkpoint {folder} is refused: a data file wants {wanted_name[1] if wanted_name else 'code'}, which "
                "is no part of a checkpoint: do not use this file"
            ) from error


def _set_model(trainer: Trained, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(trainer.chunks):
        chunk.module.load_state_dict(loaded[f"model{index}"])


def load_train_state(trainer: Trained, folder: Path) -> None:
    """Overwrite parameters and optimizer state with what ``folder`` holds. Collective."""
    with torch.no_grad():
        model = model_state(trainer)
        loaded = _read({**model, **_optimizer_state(trainer, model, is_loading=True)}, folder)
        _set_model(trainer, loaded)
        for index, part in enumerate(trainer.optimizer.chained_optimizers):
            state = part.state_dict()
            for group in state["optimizer"]["param_groups"]:
                group["step"] = loaded["optimizer_step"]
            # Nothing was asked for a part without parameters: the experts' on a stage without layers.
            state["param_state"] = loaded.get(f"optimizer{index}", {})
            state["param_state_sharding_type"] = "fully_reshardable"
            part.load_state_dict(state)


def load_model_state(trainer: Trained, folder: Path) -> None:
    """Overwrite the parameters, and the optimizer's copies of them, with what ``folder`` holds. Collective."""
    with torch.no_grad():
        _set_model(trainer, _read(model_state(trainer), folder))
        trainer.optimizer.reload_model_params()
