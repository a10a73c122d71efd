"""What a checkpoint holds of a model in training: every mesh writes the same tensors under the same names."""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.safe_globals import SafeUnpickler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_m1.checkpoint.contents import check_format
from megatron_m1.checkpoint.metadata import UNREADABLE, only_tensors, read_metadata
from megatron_m1.checkpoint.pickle_sizes import check_sizes
from megatron_m1.files import check_folder
from megatron_m1.printing import shown
from megatron_m1.runtime.mesh import Mesh
from megatron_m1.runtime.ranks import first_fault


class Share(Protocol):
    """A rank's share of a model, bare or wrapped for training."""

    @property
    def mesh(self) -> Mesh:
        """This rank's place."""

    @property
    def chunks(self) -> Sequence[DistributedDataParallel | GPTModel]:
        """Pipeline chunks of this rank."""


class Trained(Protocol):
    """What a checkpoint is made of and loaded into: a rank's share of a model that is being trained."""

    mesh: Mesh
    chunks: list[DistributedDataParallel]
    """Pipeline chunks of this rank, as megatron-core wraps them."""
    optimizer: ChainedOptimizer

    def heartbeat(self) -> None:
        """Called before what takes long, so that nobody takes it for a hang."""


def _metadata(trained: Share) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gather optimizer state in host memory. The other way puts whole gradient buckets on the GPU, and without
        # overlap_grad_reduce a bucket is the whole model.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,
        "dp_cp_group": trained.mesh.groups.dp_cp,
    }


def _bare(chunk: DistributedDataParallel | GPTModel) -> GPTModel:
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def model_state(trained: Share) -> dict[str, Any]:
    """Sharded state dict of this rank's chunks, by chunk."""
    return {
        f"model{index}": _bare(chunk).sharded_state_dict(metadata=_metadata(trained))
        for index, chunk in enumerate(trained.chunks)
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


def _optimizer_state(trained: Trained, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    # Parameter groups differ between meshes, and their settings come from the configuration: only tensors and the step
    # are kept. On save the first data-parallel rank holds them all, and the others none.
    parts = {}
    for index, part in enumerate(trained.optimizer.chained_optimizers):
        if not is_loading:
            _allocate(part)
        # Not part.sharded_state_dict, which adds a garbage collection of up to a second.
        tensors = part.sharded_param_state_fully_reshardable(model, is_loading, _metadata(trained))
        if tensors is not None:
            parts[f"optimizer{index}"] = tensors
    return parts


def _stays_shared(tensor: torch.Tensor) -> bool:
    """Whether megatron-core would write from the parameter's own memory: it copies from a GPU and what is a view."""
    return tensor.is_cpu and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def train_state(trained: Trained, *, detached: bool) -> dict[str, Any]:
    """Everything to save: parameters, optimizer state and the optimizer's step count. Collective.

    Args:
        trained: what is trained.
        detached: parameters are copied, so that training may go on while they are written. (Optimizer state always is.)
    """
    for chunk in trained.chunks:
        if chunk.ddp_config.overlap_param_gather:
            # Updated parameters would reach the other ranks with the next forward pass only.
            chunk.start_param_sync(force_sync=True)
    model = model_state(trained)
    with torch.no_grad():
        optimizer = _optimizer_state(trained, model, is_loading=False)
    if detached:
        for entry in nested_values(model):
            if isinstance(entry, ShardedTensor) and entry.data is not None and _stays_shared(entry.data):
                entry.data = entry.data.detach().clone()
    return {**model, **optimizer, "optimizer_step": _adam_step(trained.optimizer)}


def _fault(folder: Path, error: BaseException) -> str:
    """Say why a checkpoint can't be loaded."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else []
    causes = [cause for cause, _ in failures] or [error]
    for cause in causes:
        wanted_name = re.search(r"GLOBAL (\S+)", str(cause)) if isinstance(cause, pickle.UnpicklingError) else None
        if wanted_name is not None:
            return (
                f"checkpoint {folder} is refused: a data file wants {wanted_name[1]}, which is no part of a "
                "checkpoint: do not use this file"
            )
    return f"checkpoint {folder} can't be loaded ({type(causes[0]).__name__}: {causes[0]})"


def _read(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load what is wanted; what is wrong with the checkpoint is a ValueError on every rank. Collective."""
    # Every rank reads for itself: megatron-core's parallel load holds all of the optimizer state on the GPU. A tensor
    # asked for must be there; megatron-core 0.19 has stricter checks, but they fail with torch 2.15, whose
    # TensorProperties have one more field.
    with warnings.catch_warnings():
        # The warnings are about arguments that megatron-core passes to torch: who trains can't change them.
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
        # megatron-core opens and unpickles these by itself: only what has been found harmless.
        check_folder(folder)
        check_format(folder)
        read_metadata(folder)
        if os.path.lexists(folder / COMMON_STATE_FNAME):
            raise ValueError(f"checkpoint {folder} is refused: {COMMON_STATE_FNAME} is no part of a checkpoint of ours")
        loaded: dict[str, Any] = {}
        fault = None
        try:
            with only_tensors():
                loaded = dist_checkpointing.load(wanted, str(folder))
        except (*UNREADABLE, CheckpointException, CheckpointingException) as error:
            fault = _fault(folder, error)
    fault = first_fault(fault)
    if fault is not None:
        raise ValueError(fault)
    return loaded


def _check_extra_states(state: dict[str, Any], folder: Path) -> None:
    """Refuse extra states that would run something: transformer-engine unpickles them without a question.

    Raises:
        ValueError: one is no state of its layers.
    """
    for name, extra in state.items():
        if "_extra_state" in name and isinstance(extra, torch.Tensor) and extra.numel():
            try:
                content = extra.detach().cpu().numpy().tobytes()
                check_sizes(content)
                SafeUnpickler(io.BytesIO(content)).load()
            except UNREADABLE as error:
                raise ValueError(f"checkpoint {folder} is refused: {name} is no state of a layer ({error})") from error


def _set_model(trained: Share, loaded: dict[str, Any], folder: Path) -> None:
    states = [loaded[f"model{index}"] for index in range(len(trained.chunks))]
    for state in states:
        _check_extra_states(state, folder)
    for chunk, state in zip(trained.chunks, states, strict=True):
        try:
            with only_tensors():
                _bare(chunk).load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"checkpoint {folder} is not of this model: {error}") from error


def _stored_step(loaded: dict[str, Any], folder: Path) -> int:
    step = loaded.get("optimizer_step")
    if type(step) is not int or not 0 <= step < 1 << 63:
        raise ValueError(f"checkpoint {folder} is damaged: its optimizer_step is {shown(step)}")
    return step


def load_train_state(trained: Trained, folder: Path) -> None:
    """Overwrite parameters and optimizer state with what ``folder`` holds. Collective.

    Raises:
        ValueError: it can't be loaded, or is refused; one line.
    """
    with torch.no_grad():
        model = model_state(trained)
        loaded = _read({**model, **_optimizer_state(trained, model, is_loading=True)}, folder)
        step = _stored_step(loaded, folder)
        _set_model(trained, loaded, folder)
        for index, part in enumerate(trained.optimizer.chained_optimizers):
            state = part.state_dict()
            for group in state["optimizer"]["param_groups"]:
                group["step"] = step
            # Nothing was asked for a part without parameters: the experts' on a stage without layers.
            state["param_state"] = loaded.get(f"optimizer{index}", {})
            state["param_state_sharding_type"] = "fully_reshardable"
            part.load_state_dict(state)


def load_model_state(trained: Trained, folder: Path) -> None:
    """Overwrite the parameters, and the optimizer's copies of them, with what ``folder`` holds. Collective.

    Raises:
        ValueError: as of ``load_train_state``.
    """
    load_weights(trained, folder)
    with torch.no_grad():
        trained.optimizer.reload_model_params()


def load_weights(share: Share, folder: Path) -> None:
    """Overwrite the parameters of a model that nothing trains with what ``folder`` holds. Collective.

    Raises:
        ValueError: as of ``load_train_state``.
    """
    with torch.no_grad():
        _set_model(share, _read(model_state(share), folder), folder)
