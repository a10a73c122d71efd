"""The whole model against transformers' MiniMax: logits, loss and every gradient, packs against documents run alone.

Errors are relative to the largest logit, and to each gradient's largest entry.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.common.transformers_weights import expected
from megatron_m1.config import Config, ModelConfig, ResolvedConfig
from megatron_m1.config.resolve import resolve
from megatron_m1.layers.head import token_losses
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.runtime import mesh
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.trained_model import build_chunks
from tests.reference.transformers_minimax import build, partial_rotary
from tests.tolerances import of_largest, whole_model

VOCAB = 99
SHAPE: dict[str, Any] = {"layers": 8, "hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 24, "ffn": 40, "experts": 5}


def _our_config(rotary_dim: int, theta: float, alpha: float | None) -> ResolvedConfig:
    config = Config()
    config.model = ModelConfig(
        num_layers=SHAPE["layers"],
        hidden_size=SHAPE["hidden"],
        num_attention_heads=SHAPE["heads"],
        kv_channels=SHAPE["head_dim"],
        num_query_groups=SHAPE["kv_heads"],
        moe_ffn_hidden_size=SHAPE["ffn"],
        num_moe_experts=SHAPE["experts"],
        vocab_size=VOCAB,
        rotary_percent=rotary_dim / SHAPE["head_dim"],
        rotary_base=theta,
        residual_alpha=alpha,
        moe_aux_loss_coeff=0.0,
        lm_head_chunk_mib=0.01,  # the loss in many chunks, against transformers' whole logits
    )
    config.data.seq_length = 512
    return resolve(config, 1, has_gpu=False)


def compare(rank: int, world_size: int, bounds: list[int], rotary_dim: int, alpha: float) -> dict[str, float]:
    """Worst relative errors of logits, loss and gradients of one pack."""
    theta = 10_000.0
    theirs = build(**SHAPE, vocab=VOCAB, rotary_dim=rotary_dim, rope_theta=theta, softmax_every=8, alpha=alpha, seed=3)
    config = _our_config(rotary_dim, theta, alpha)
    (ours,) = build_chunks(config, mesh.initialise(config.parallel, seed=1))
    parameters = dict(ours.named_parameters())
    copied = set()
    with torch.no_grad():
        for name, value in expected(theirs):
            parameters[name].copy_(value)
            copied.add(name)
    assert copied == set(parameters)
    generator = torch.Generator().manual_seed(7)
    tokens, labels = (torch.randint(0, VOCAB, (bounds[-1],), generator=generator) for _ in range(2))
    with partial_rotary(rotary_dim):
        alone = [theirs(tokens[None, a:b], use_cache=False).logits[0] for a, b in pairwise(bounds)]
    their_logits = torch.cat(alone)
    their_loss = cross_entropy(their_logits, labels, reduction="sum")
    their_loss.backward()
    params = PackedBatchParams.of(SequenceLayout.build(bounds))
    our_logits = ours(tokens[None], None, None, packed_seq_params=params)[0]  # [n, vocab]
    our_loss = token_losses(ours, tokens[None], labels[None], params).sum()
    our_loss.backward()
    gradients = {
        name: ((parameters[name].grad - value).abs().max() / value.abs().max()).item()
        for name, value in expected(theirs, "grad")
        if value.abs().max() > 0
    }
    return {
        "logits": ((our_logits - their_logits).abs().max() / their_logits.abs().max()).item(),
        "loss": abs(our_loss.item() / their_loss.item() - 1.0),
        "gradients": max(gradients.values()),
        "compared": len(gradients),
        "logits allowed": of_largest(whole_model(config.model, bounds[-1]), our_logits.numel()),
        "gradients allowed": of_largest(
            whole_model(config.model, bounds[-1], gradients=True), sum(p.numel() for p in parameters.values())
        ),
    }


@pytest.mark.parametrize(
    ("bounds", "rotary_dim"),
    [([0, 333], 12), ([0, 257], 24), ([0, 1, 40, 300, 301, 333], 12)],
    ids=["one-document", "full-rotary", "pack"],
)
def test_logits_loss_and_gradients_equal_transformers(bounds: list[int], rotary_dim: int, workers: WorkerPool) -> None:
    (errors,) = workers.run(compare, bounds, rotary_dim, (2.0 * 8) ** 0.25, world_size=1)
    assert errors["compared"] == 3 + 7 * 6 + 5 + 8 * 2 * SHAPE["experts"]
    for what, allowed in (("logits", "logits"), ("loss", "logits"), ("gradients", "gradients")):
        assert errors[what] < errors[f"{allowed} allowed"], what
