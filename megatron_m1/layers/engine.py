"""megatron-core's TransformerConfig for our model: the stock fields, and beside them our own configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_m1.config import ModelConfig, ResolvedConfig


@dataclass
class EngineConfig(TransformerConfig):
    """What every module of the model reads. Built by ``engine_config``; one per pipeline chunk."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape and numerics of the whole model, as resolved: what is ours is read here, not from a copy of it."""
    moe_token_groups: int = 1
    """Of ``ParallelConfig``."""

    @property
    def lm_head_chunk_bytes(self) -> int:
        """Memory for the logits of the tokens whose loss is computed at a time."""
        return math.ceil(self.model.lm_head_chunk_mib * 2**20)


def _leave_uninitialised(weight: Tensor) -> Tensor:
    # initialise.py fills every parameter by its global name, so that no mesh changes the initial weights;
    # megatron-core's own call still has to happen because it marks tensor-parallel parameters.
    return weight


def engine_config(config: ResolvedConfig, *, dtype: torch.dtype, on_default_device: bool = False) -> EngineConfig:
    """Translate the configuration into what megatron-core's modules read.

    Args:
        config: the run's configuration after ``resolve.resolve``.
        dtype: parameters and activations, ``torch.bfloat16`` or ``torch.float32``.
        on_default_device: allocate on the surrounding default device (``with torch.device("meta")``), not on the
            current GPU.
    """
    model, parallel, train = config.model, config.parallel, config.train
    virtual = parallel.virtual_pipeline_model_parallel_size
    selective = train.recompute_granularity == "selective"
    transformer_engine = model.transformer_impl == "transformer_engine"
    return EngineConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.moe_ffn_hidden_size,
        num_moe_experts=model.num_moe_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_router_topk=model.moe_router_topk,
        moe_router_dtype="fp32",
        moe_router_pre_softmax=False,
        moe_router_load_balancing_type=model.moe_router_load_balancing_type,
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_z_loss_coeff=model.moe_z_loss_coeff,
        moe_router_score_function=model.moe_router_score_function,
        moe_router_enable_expert_bias=model.moe_router_enable_expert_bias,
        moe_router_bias_update_rate=model.moe_router_bias_update_rate,
        # Our router drops by the tokens of all ranks. The library must not, but has to know that numbers vary.
        moe_expert_capacity_factor=None if model.moe_expert_capacity_factor is None else 2.0 * model.num_moe_experts,
        moe_token_dispatcher_type=model.moe_token_dispatcher_type,
        moe_grouped_gemm=transformer_engine,
        moe_permute_fusion=transformer_engine,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=transformer_engine,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        use_cpu_initialization=on_default_device,
        # On a CPU the library would draw a whole fp32 matrix for every slice.
        perform_initialization=not on_default_device,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8=model.fp8,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        # Interleaved stages train silently wrong with batched P2P.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,
        recompute_granularity=train.recompute_granularity,
        recompute_method="uniform" if train.recompute_granularity == "full" else None,
        recompute_num_layers=train.recompute_num_layers if train.recompute_granularity == "full" else None,
        recompute_modules=list(train.recompute_modules) if selective else None,
        # Lightning and softmax layers have different shapes under one key (the spelling is megatron-core's).
        hetereogenous_dist_checkpoint=True,
        model=model,
        moe_token_groups=parallel.moe_token_groups,
    )
