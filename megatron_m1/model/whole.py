"""The whole model on one device of one process, whatever else runs there: to look at it, to run it, to count it."""

from __future__ import annotations

import dataclasses

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.resolve import resolve
from megatron_m1.layers.engine import engine_config
from megatron_m1.model.build import build_chunk
from megatron_m1.runtime.alone import default_group, groups_of_one


def build_whole(model: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> GPTModel:
    """Build a model that belongs to no mesh, its parameters allocated and not initialised, in evaluation mode.

    It drops no token, and its modules are torch's own. What depends on the machine that trained it is chosen anew. Call
    it within ``runtime.alone.default_group``.

    Args:
        model: shape and numerics.
        dtype: of parameters and products; routers and an FP32 head are fp32 whatever it is.
        device: where; "meta" takes no memory.

    Raises:
        ValueError: the shape is of no possible model.
    """
    shape = dataclasses.replace(
        model,
        moe_expert_capacity_factor=None,
        # The other one waits for streams of a GPU; with nobody to send to, both do the same.
        moe_token_dispatcher_type="allgather",
        transformer_impl="local",
        fp8=None,
        lightning_backend="auto",
    )
    config = resolve(Config(model=shape), 1, has_gpu=device.type == "cuda")
    with default_group(), device:
        whole = build_chunk(
            engine_config(config, dtype=dtype, on_default_device=True),
            vocab_size=shape.vocab_size,
            max_sequence_length=config.data.seq_length,
            pg_collection=groups_of_one(),
        )
    return whole.eval()
