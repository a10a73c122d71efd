"""Initial weights that no mesh changes: Xavier with DeepNorm's gain, drawn by global name.

Every logical matrix (q, k, v and gate apart, w1 and w3 apart, each expert) has its own random stream, keyed by the
seed, its global name and a block of rows. A rank draws the blocks that it holds and keeps its slice, so TP, PP, EP, ETP
and DP never change a weight. (A GPU and a CPU draw different numbers.)

Source: MiniMax-01 paper, section 4.2 (Xavier for all parameters, beta = (8N)^(-1/4)); DeepNet (arXiv 2203.00555), which
puts beta on the value and output projections and on the FFN, and 1 on queries and keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_m1.layers.engine import EngineConfig
from megatron_m1.layers.lightning import LightningAttention

BLOCK_ROWS = 256


@dataclass(frozen=True)
class Matrix:
    """A logical weight matrix and the slice of it that one rank holds.

    Args:
        name: global name, the same on every mesh.
        rows, columns: full shape [fan_out, fan_in].
        first_row, first_column: where the held slice starts.
        gain: Xavier gain.
    """

    name: str
    rows: int
    columns: int
    first_row: int = 0
    first_column: int = 0
    gain: float = 1.0


def deepnorm_gain(num_layers: int) -> float:
    """(8 N)^(-1/4): 0.19882 for M1's 80 layers."""
    return (8.0 * num_layers) ** -0.25


def _block(matrix: Matrix, index: int, seed: int, device: torch.device) -> Tensor:
    rows = min(BLOCK_ROWS, matrix.rows - index * BLOCK_ROWS)
    digest = hashlib.blake2b(f"{seed}/{matrix.name}/{index}".encode(), digest_size=7).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big"))
    std = matrix.gain * math.sqrt(2.0 / (matrix.rows + matrix.columns))
    return torch.randn((rows, matrix.columns), generator=generator, device=device) * std


def fill(target: Tensor, matrix: Matrix, seed: int) -> None:
    """Overwrite ``target`` with its slice of ``matrix``.

    Args:
        target: [..., columns held]; its leading dimensions are consecutive rows of the matrix. May be a strided view.
        matrix: what to draw.
        seed: the run's seed.
    """
    held_columns = target.shape[-1]
    held_rows = target.numel() // held_columns
    slab = torch.empty((held_rows, held_columns), dtype=target.dtype, device=target.device)
    last_row = matrix.first_row + held_rows
    columns = slice(matrix.first_column, matrix.first_column + held_columns)
    for index in range(matrix.first_row // BLOCK_ROWS, math.ceil(last_row / BLOCK_ROWS)):
        start = index * BLOCK_ROWS
        block = _block(matrix, index, seed, target.device)
        low, high = max(start, matrix.first_row), min(start + block.shape[0], last_row)
        slab[low - matrix.first_row : high - matrix.first_row] = block[low - start : high - start, columns]
    with torch.no_grad():
        target.copy_(slab.view(target.shape))


def _lightning(attention: LightningAttention, prefix: str, config: EngineConfig) -> Iterator[tuple[Tensor, Matrix]]:
    width = config.num_attention_heads * config.kv_channels
    heads, dim = attention.local_heads, attention.head_dim
    offset = attention.tp_group.rank() * heads * dim
    beta = deepnorm_gain(config.num_layers)
    # [heads * 4 * dim, hidden] -> [heads, 4, dim, hidden]
    parts = attention.linear_qkvg.weight.data.view(heads, 4, dim, config.hidden_size)
    for index, (part, gain) in enumerate((("q", 1.0), ("k", 1.0), ("v", beta), ("gate", 1.0))):
        yield parts[:, index], Matrix(f"{prefix}.{part}", width, config.hidden_size, first_row=offset, gain=gain)
    out = attention.linear_proj.weight.data
    yield out, Matrix(f"{prefix}.out", config.hidden_size, width, first_column=offset, gain=beta)


def _softmax(attention: Any, prefix: str, config: EngineConfig) -> Iterator[tuple[Tensor, Matrix]]:
    assert config.num_query_groups is not None and config.kv_channels is not None
    dim, hidden, rank = config.kv_channels, config.hidden_size, attention.tp_group.rank()
    heads, groups = config.num_attention_heads, config.num_query_groups
    per_group = heads // groups
    beta = deepnorm_gain(config.num_layers)
    held = attention.linear_qkv.weight.data
    first = rank * held.shape[0]
    # Rows: for each group its q heads, then k, then v. With more ranks than groups a rank's rows start anywhere.
    for block in range(first // dim, math.ceil((first + held.shape[0]) / dim)):
        group, slot = divmod(block, per_group + 2)
        low, high = max(block * dim, first), min((block + 1) * dim, first + held.shape[0])
        inside = low - block * dim
        if slot < per_group:
            matrix = Matrix(f"{prefix}.q", heads * dim, hidden, first_row=(group * per_group + slot) * dim + inside)
        else:
            part, gain = ("k", 1.0) if slot == per_group else ("v", beta)
            matrix = Matrix(f"{prefix}.{part}", groups * dim, hidden, first_row=group * dim + inside, gain=gain)
        yield held[low - first : high - first], matrix
    out = attention.linear_proj.weight.data
    yield out, Matrix(f"{prefix}.out", hidden, heads * dim, first_column=rank * out.shape[1], gain=beta)


def _expert_weights(experts: Any, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    if hasattr(experts, "local_experts"):
        for expert in experts.local_experts:
            yield expert.linear_fc1.weight.data, expert.linear_fc2.weight.data
    else:  # one module for all local experts: transformer-engine's grouped linears
        for index in range(count):
            yield (
                getattr(experts.linear_fc1, f"weight{index}").data,
                getattr(experts.linear_fc2, f"weight{index}").data,
            )


def _moe(moe: Any, prefix: str, config: EngineConfig, etp_rank: int) -> Iterator[tuple[Tensor, Matrix]]:
    hidden, inner = config.hidden_size, config.moe_ffn_hidden_size
    assert inner is not None and config.num_moe_experts is not None
    beta = deepnorm_gain(config.num_layers)
    yield moe.router.weight.data, Matrix(f"{prefix}.router", config.num_moe_experts, hidden)
    for index, (fc1, fc2) in zip(
        moe.local_expert_indices, _expert_weights(moe.experts, moe.num_local_experts), strict=True
    ):
        held = fc2.shape[1]
        offset = etp_rank * held
        name = f"{prefix}.experts.{index}"
        yield fc1[:held], Matrix(f"{name}.w1", inner, hidden, first_row=offset, gain=beta)
        yield fc1[held:], Matrix(f"{name}.w3", inner, hidden, first_row=offset, gain=beta)
        yield fc2, Matrix(f"{name}.w2", hidden, inner, first_column=offset, gain=beta)


def _matrices(model: GPTModel, vocab_size: int) -> Iterator[tuple[Tensor, Matrix]]:
    config: EngineConfig = model.config
    groups = model.pg_collection
    vocab = {"rows": vocab_size, "columns": config.hidden_size}
    vocab_row = groups.tp.rank() * vocab_size // groups.tp.size()
    if model.pre_process:
        yield model.embedding.word_embeddings.weight.data, Matrix("embedding", first_row=vocab_row, **vocab)
    if model.post_process:
        yield model.output_layer.weight.data, Matrix("head", first_row=vocab_row, **vocab)
    for layer in model.decoder.layers:
        prefix = f"layers.{layer.layer_number - 1}"
        attend = _lightning if isinstance(layer.self_attention, LightningAttention) else _softmax
        yield from attend(layer.self_attention, f"{prefix}.attention", config)
        yield from _moe(layer.mlp, f"{prefix}.moe", config, groups.expt_tp.rank())


def initialise_weights(model: GPTModel, *, vocab_size: int, seed: int) -> None:
    """Fill every matrix of one pipeline chunk; norms keep their ones.

    Args:
        model: from ``build.build_chunk``.
        vocab_size: full rows of embedding and head.
        seed: the run's seed.
    """
    filled = 0
    for target, matrix in _matrices(model, vocab_size):
        fill(target, matrix, seed)
        filled += target.numel()
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert filled + norms == sum(p.numel() for p in model.parameters())
