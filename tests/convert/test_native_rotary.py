"""Half-rotated heads in native transformers: exact in every number, and undone bit for bit.

The truth is transformers' model with its rotation patched to M1's (``tests/reference``), which shares no code with the
format. fp32: what two orders of the same sums differ by, over 8 layers, stays below 2e-5 of the largest number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxRotaryEmbedding

from megatron_m1.convert import native_rotary
from tests.convert.folders import convert, weights
from tests.reference.transformers_minimax import build, partial_rotary

TOLERANCE = 2e-5
SHAPE: dict[str, Any] = dict(
    layers=8, hidden=48, heads=4, kv_heads=2, ffn=40, experts=5, rope_theta=1e4, softmax_every=4, alpha=2.0, vocab=99
)
HEADS = [(24, 12), (16, 4), (16, 14), (6, 2)]
"""Dimensions of a head, and how many of them are rotated."""


def hub_folder(folder: Path, head_dim: int, rotated: int) -> MiniMaxForCausalLM:
    """A folder in the hub's format, by transformers' own saving and keys written by hand; its model, to be patched."""
    model = build(**SHAPE, head_dim=head_dim, rotary_dim=rotated, seed=5)
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"postnorm": True, "rotary_dim": rotated}))
    return model


def losses_and_gradients(model: MiniMaxForCausalLM) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 99, (1, 301), generator=generator)
    output = model(ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach(), {n: p.grad for n, p in model.named_parameters()}  # type: ignore[misc]


def by_pairs(rows: Tensor, head_dim: int, half: int, other: int) -> list[Tensor]:
    """Rows of every head that turn together: (i, other + i) for the first ``half``; then the rest."""
    heads = rows.view(-1, head_dim, rows.shape[-1])
    rest = [i for i in range(head_dim) if not (i < half or other <= i < other + half)]
    return [heads[:, :half], heads[:, other : other + half], heads[:, rest]]


@pytest.mark.parametrize(("head_dim", "rotated"), HEADS)
def test_native_transformers_is_exact(tmp_path: Path, head_dim: int, rotated: int) -> None:
    truth = hub_folder(tmp_path / "hub", head_dim, rotated)
    convert("from-hf", tmp_path / "hub", tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "native", "--format", "native")
    native = MiniMaxForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32, attn_implementation="eager")
    with partial_rotary(rotated):
        logits, loss, gradients = losses_and_gradients(truth)
    found_logits, found_loss, found = losses_and_gradients(native.eval())
    assert (found_logits - logits).abs().max() < TOLERANCE * logits.abs().max()
    assert abs(found_loss - loss) < TOLERANCE
    assert found.keys() == gradients.keys()
    for name, value in gradients.items():
        pieces = [(found[name], value)]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            theirs = by_pairs(found[name], head_dim, rotated // 2, head_dim // 2)
            pieces = list(zip(theirs, by_pairs(value, head_dim, rotated // 2, rotated // 2), strict=True))
        for got, wanted in pieces:
            assert (got - wanted).abs().max() < TOLERANCE * value.abs().max(), name


def test_without_it_transformers_is_wrong(tmp_path: Path) -> None:
    """That the comparison above would see it."""
    truth = hub_folder(tmp_path / "hub", 24, 12)
    with partial_rotary(12):
        logits, _, _ = losses_and_gradients(truth)
    wrong = MiniMaxForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32, attn_implementation="eager")
    assert (losses_and_gradients(wrong.eval())[0] - logits).abs().max() > 100 * TOLERANCE * logits.abs().max()


@pytest.mark.parametrize("saved_by", ["us", "transformers"])
def test_it_is_undone_bit_for_bit(tmp_path: Path, saved_by: str) -> None:
    hub_folder(tmp_path / "hub", 16, 4)
    convert("from-hf", tmp_path / "hub", tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "plain")
    convert("to-hf", tmp_path / "ours", tmp_path / "native", "--format", "native", "--verify")
    source = tmp_path / "native"
    if saved_by == "transformers":
        source = tmp_path / "again"
        MiniMaxForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32).save_pretrained(source)
    convert("from-hf", source, tmp_path / "back", "--verify")
    convert("to-hf", tmp_path / "back", tmp_path / "returned")
    before, after, native = (weights(tmp_path / name) for name in ("plain", "returned", "native"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.view(torch.int32), after[name].view(torch.int32)), name
    moved = {name for name, value in before.items() if not torch.equal(native[name], value)}
    assert moved == {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (3, 7) for x in "qk"}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "returned")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "change",
    [
        {"long_factor": [1.0] * 8},
        {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        {"attention_factor": 1.2},
        {"rope_theta": 2e4},
        {"short_factor": None},
        {"partial_rotary_factor": 0.5},
        {"attention_factor": None},
    ],
    ids=str,
)
def test_another_longrope_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    hub_folder(tmp_path / "hub", 16, 4)
    convert("from-hf", tmp_path / "hub", tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "native", "--format", "native")
    path = tmp_path / "native" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="longrope are not those that rotate the first dimensions"):
        convert("from-hf", tmp_path / "native", tmp_path / "back")


def test_angles_of_far_tokens() -> None:
    """M1's own shape, up to a million tokens: as near to the true angles as fp32 frequencies let them be.

    A frequency has one rounding of a power, one of a product and one of a quotient: 2^-24 of itself each, the power
    twice that; the angle has as many times its position.
    """
    parameters = native_rotary.rope_parameters(base=1e7, rotated=64, head_dim=128, max_positions=1 << 20)
    config = MiniMaxConfig(head_dim=128, rope_parameters=parameters, max_position_embeddings=1 << 20)
    theirs = MiniMaxRotaryEmbedding(config)
    assert theirs.attention_scaling == 1.0
    frequencies = theirs.inv_freq.double().numpy()
    true = 1e7 ** (-np.arange(0, 64, 2) / 64)
    assert np.all(np.abs(frequencies[:32] / true - 1) < 5 * 2.0**-24)
    assert np.all(frequencies[32:] * 1e7 < 1e-24), "the cosine of such an angle is 1 in fp32, its sine nothing"
