"""Where a new run's weights come from, if not from chance: a Hugging Face folder, a checkpoint, another run."""

from __future__ import annotations

from pathlib import Path

from torch import distributed as dist

from megatron_m1.checkpoint.contents import check_shape
from megatron_m1.checkpoint.folder import COMMIT_MARK, CONFIG, read_state
from megatron_m1.checkpoint.store import load_model
from megatron_m1.config import ResolvedConfig
from megatron_m1.config.io import load_config
from megatron_m1.config.paths import HUGGING_FACE
from megatron_m1.convert.hub_folder import open_hub_folder
from megatron_m1.convert.licences import LICENCES, keep_licences, licences_of
from megatron_m1.convert.load_hf import CHECKPOINT, LoadOptions, load_hf
from megatron_m1.convert.places import find_checkpoint
from megatron_m1.convert.work import Ranks, stamps
from megatron_m1.printing import shown
from megatron_m1.training.run_folder import IMPORTED
from megatron_m1.training.trained_model import TrainedModel


def load_initial(trained: TrainedModel, config: ResolvedConfig, init_from: str) -> Path:
    """Overwrite the parameters with those of ``init_from``, the run's. Collective.

    A Hugging Face folder is first written as a checkpoint, ``<run.folder>/initial``, by all ranks together. For a model
    that takes longer than ``parallel.distributed_timeout_seconds``, run ``megatron-m1 convert from-hf`` before.

    Args:
        trained: new, on any mesh.
        config: the run's.
        init_from: ``config.run.init_from``, which is given.

    Returns:
        The checkpoint that was read.

    Raises:
        ConversionError: the checkpoint can't be written.
        ValueError: it is damaged or of another shape.
    """
    checkpoint = (
        imported_checkpoint(config, init_from.removeprefix(HUGGING_FACE))
        if init_from.startswith(HUGGING_FACE)
        else find_checkpoint(Path(init_from))
    )
    saved = load_config(checkpoint / CONFIG).model
    check_shape(config.model, saved, checkpoint, fix="give the model that shape, or start from others")
    load_model(trained, checkpoint)
    if dist.get_rank() == 0:
        keep_licences(licences_of(checkpoint), Path(config.run.folder) / LICENCES)
    return checkpoint


def imported_checkpoint(config: ResolvedConfig, hub_folder: str) -> Path:
    """Write a Hugging Face folder as a checkpoint of ``run.folder``, unless it is there; return that. Collective.

    Raises:
        ConversionError: it can't be written.
        ValueError: the folder can't be read, or what is there was made of another one.
    """
    source = Path(hub_folder)
    out = Path(config.run.folder) / IMPORTED
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    # One rank looks, so that none sees what another has only just written.
    is_there = ranks.gather((out / CHECKPOINT / COMMIT_MARK).is_file())[0]
    if not is_there:
        return load_hf(open_hub_folder(source), out, LoadOptions(), ranks)
    known = read_state(out / CHECKPOINT)
    if known.get("source") != str(source.resolve()):
        raise ValueError(
            f"{out} was made of {shown(known.get('source'))}, run.init_from is {source}: remove it, or choose another "
            "run.folder"
        )
    if known.get("source_files") != stamps(source):
        raise ValueError(f"{source} has changed since {out} was made of it: remove this, or choose another run.folder")
    return out / CHECKPOINT
