"""Initial weights that no mesh changes: Xavier with the residual scheme's gain, drawn by global name.

Every logical matrix (q, k, v and gate apart, w1 and w3 apart, each expert) has its own random stream, keyed by the
seed, its global name and a block of rows. A rank draws the blocks that it holds and keeps its slice, so TP, PP, EP, ETP
and DP never change a weight. (A GPU and a CPU draw different numbers.)

Source: MiniMax-01 paper, section 4.2 (Xavier for all parameters). The gains are in ``shapes.residual``; every kind of
layer says which of its matrices has which.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_m1.layers.engine import EngineConfig
from megatron_m1.layers.kind import Matrix
from megatron_m1.layers.registry import sub_layers

BLOCK_ROWS = 256


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


def _matrices(model: GPTModel, vocab_size: int) -> Iterator[tuple[Tensor, Matrix]]:
    config: EngineConfig = model.config
    groups = model.pg_collection
    vocab = {"rows": vocab_size, "columns": config.hidden_size}
    vocab_row = groups.tp.rank() * vocab_size // groups.tp.size()
    if model.pre_process:
        yield model.embedding.word_embeddings.weight.data, Matrix("embedding", first_row=vocab_row, **vocab)
    if model.post_process:
        yield model.output_layer.weight.data, Matrix("head", first_row=vocab_row, **vocab)
    for name, kind, module in sub_layers(model):
        yield from kind.matrices(module, name, config, groups)


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
