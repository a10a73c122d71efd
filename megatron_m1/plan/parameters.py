"""Parameters of a model, from its shapes alone: the one place that counts them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_m1.config import ModelConfig, ParallelConfig
from megatron_m1.config.pipeline import StageLayers, plan_stages


@dataclass(frozen=True)
class Counts:
    """Parameters by kind."""

    embedding: int = 0
    lightning_attention: int = 0
    """qkv, gate and output matrices and the norm inside."""
    softmax_attention: int = 0
    router: int = 0
    experts: int = 0
    norms: int = 0
    """The two norms of each layer and the final one."""
    head: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def without_vocabulary(self) -> int:
        """All parameters outside the embedding and the head."""
        return self.total - self.embedding - self.head

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def layer_counts(model: ModelConfig, index: int, *, experts: int | None = None) -> Counts:
    """Count layer ``index`` (from 0, over the whole model).

    Args:
        model: shape of the model.
        index: which layer.
        experts: experts to count; None counts all, ``moe_router_topk`` those that one token visits.
    """
    hidden, inner = model.hidden_size, model.num_attention_heads * model.kv_channels
    common = Counts(
        router=model.num_moe_experts * hidden,
        experts=(model.num_moe_experts if experts is None else experts) * 3 * hidden * model.moe_ffn_hidden_size,
        norms=2 * hidden,
    )
    if (index + 1) % model.attention_period == 0:
        key_value = model.num_query_groups * model.kv_channels
        return common + Counts(softmax_attention=hidden * (inner + 2 * key_value) + inner * hidden)
    return common + Counts(lightning_attention=hidden * 3 * inner + hidden * inner + inner * hidden + inner)


def model_counts(model: ModelConfig, *, active: bool = False) -> Counts:
    """Count the whole model, or with ``active`` only what one token passes through (its top-k experts)."""
    experts = model.moe_router_topk if active else None
    vocabulary = model.vocab_size * model.hidden_size
    counts = Counts(embedding=vocabulary, norms=model.hidden_size, head=vocabulary)
    for index in range(model.num_layers):
        counts += layer_counts(model, index, experts=experts)
    return counts


def rank_counts(model: ModelConfig, parallel: ParallelConfig) -> list[Counts]:
    """Count what one rank of each pipeline stage holds (all its virtual chunks; ranks of a stage hold equally many).

    Args:
        model: shape of the model.
        parallel: a mesh that fits it.

    Returns:
        One entry a pipeline rank.
    """
    stages = plan_stages(model, parallel)
    return [sum((_chunk_counts(chunk, model, parallel) for chunk in chunks), Counts()) for chunks in stages.by_rank]


def _chunk_counts(chunk: StageLayers, model: ModelConfig, parallel: ParallelConfig) -> Counts:
    tensor = parallel.tensor_model_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * (parallel.expert_tensor_parallel_size or 1)
    vocabulary = model.vocab_size // tensor * model.hidden_size
    counts = Counts(
        embedding=vocabulary if chunk.has_embedding else 0,
        head=vocabulary if chunk.has_head else 0,
        norms=model.hidden_size if chunk.has_head else 0,
    )
    for index in chunk.layers:
        whole = layer_counts(model, index)
        counts += Counts(
            lightning_attention=whole.lightning_attention // tensor,
            softmax_attention=whole.softmax_attention // tensor,
            router=whole.router,
            experts=whole.experts // expert_ranks,
            norms=whole.norms,
        )
    return counts
