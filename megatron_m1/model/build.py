"""MiniMax-M1 on megatron-core's GPTModel: one layer spec per layer, no subclass of the layer or the model.

This is the only file that knows how the model is put together, so that megatron-core's successor of ``GPTModel`` can
take its place.
"""

from __future__ import annotations

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_pg_rank

from megatron_m1.layers.engine import EngineConfig
from megatron_m1.layers.head import OutputLayer
from megatron_m1.layers.kind import LayerKind
from megatron_m1.layers.registry import layer_kinds
from megatron_m1.layers.residual import block_norm, scaled_residual
from megatron_m1.model.providers import Implementation, spec_provider


def layer_spec(config: EngineConfig, kinds: tuple[LayerKind, LayerKind], provider: BackendSpecProvider) -> ModuleSpec:
    """Spec of a layer whose mixer and feed-forward network are of these kinds."""
    mixer, ffn = kinds
    norm = block_norm(config.model, provider.layer_norm(rms_norm=True))
    add = scaled_residual(config.model)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=mixer.spec(config, provider),
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=ffn.spec(config, provider),
            mlp_bda=add,
        ),
    )


def build_chunk(
    config: EngineConfig,
    *,
    vocab_size: int,
    max_sequence_length: int,
    implementation: Implementation = "local",
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """Build one pipeline chunk of the model, its parameters allocated and not initialised.

    Router and FP32-head weights are fp32 whatever ``config.params_dtype`` is: do this before DDP wraps the chunk.

    Args:
        config: engine configuration.
        vocab_size: rows of the embedding, divisible by the tensor-parallel size.
        max_sequence_length: tokens of a pack.
        implementation: which linears, norms and experts.
        pre_process, post_process: whether the chunk holds the embedding, the final norm and head.
        vp_stage: virtual stage, None without interleaving.
        pg_collection: process groups; None takes megatron-core's initialised ones.
    """
    on_gpu = torch.get_default_device().type == "cuda" if config.use_cpu_initialization else torch.cuda.is_available()
    provider = spec_provider(implementation, on_gpu=on_gpu)
    stage = get_pg_rank(pg_collection.pp) if pg_collection is not None else None
    first = get_transformer_layer_offset(config, vp_stage, stage)
    count = get_num_layers_to_build(config, vp_stage, stage)
    final_norm = provider.layer_norm(rms_norm=True)
    model = GPTModel(
        config,
        TransformerBlockSubmodules(
            layer_specs=[
                layer_spec(config, kinds, provider) for kinds in layer_kinds(config.model)[first : first + count]
            ],
            layer_norm=final_norm,
        ),
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    if post_process:
        _replace_head(model, config, vocab_size)
    return model


def _replace_head(model: GPTModel, config: EngineConfig, vocab_size: int) -> None:
    head = OutputLayer(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        tp_group=model.pg_collection.tp,
    )
    if config.model.lm_head_precision == "fp32":
        head.weight.data = head.weight.data.to(torch.float32)
    model.output_layer = head
    model.setup_embeddings_and_output_layer()
