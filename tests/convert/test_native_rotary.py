"""Half-rotated heads in native transformers: exact in every number, and undone bit for bit.

The truth is transformers' model with its rotation patched to M1's (``tests/reference``), which shares no code with the
format. fp32: what two orders of the same sums differ by, over 8 layers, stays below 2e-5 of the largest number.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxRotaryEmbedding

from megatron_m1.config.presets import tiny
from megatron_m1.convert.families.minimax_m1 import rotary
from megatron_m1.convert.families.minimax_m1.config import model_from_hf, native_config
from megatron_m1.layers.softmax import rotate
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


def test_the_spelling_of_earlier_versions_says_the_same(tmp_path: Path) -> None:
    """transformers before 5 ignores rope_parameters, in silence; a later one still reads what those read."""
    hub_folder(tmp_path / "hub", 16, 4)
    convert("from-hf", tmp_path / "hub", tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "native", "--format", "native")
    path = tmp_path / "native" / "config.json"
    config = json.loads(path.read_text())
    found = []
    for ignored in ({"rope_scaling", "rope_theta"}, {"rope_parameters"}):
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in ignored}))
        model = MiniMaxForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
        found.append(model(torch.arange(99)[None]).logits.detach())
    assert torch.equal(found[0], found[1])


FACTORS = rotary.rope_parameters(base=1e4, rotated=16, head_dim=32, max_positions=64)["short_factor"]


@pytest.mark.parametrize(
    "change",
    [
        {"long_factor": [1.0] * 16},
        {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16},
        {"short_factor": FACTORS[::-1], "long_factor": FACTORS[::-1]},
        {"short_factor": [*FACTORS[:-1], 10**400], "long_factor": [*FACTORS[:-1], 10**400]},
        {"short_factor": [*FACTORS[:-1], math.nan], "long_factor": [*FACTORS[:-1], math.nan]},
        {"short_factor": FACTORS[1:], "long_factor": FACTORS[1:]},
        {"attention_factor": 1.2},
        {"rope_theta": 2e4},
        {"rope_theta": -1e4},
        {"short_factor": None},
        {"partial_rotary_factor": 0.5},
        {"partial_rotary_factor": 1.0},
        {"attention_factor": None},
        {"type": "longrope"},
    ],
    ids=str,
)
def test_another_longrope_is_refused(change: dict[str, Any]) -> None:
    config = native_config(tiny(), torch.float32, 64)
    assert model_from_hf(config).rotary_percent == 0.5
    parameters = config["rope_parameters"] | change
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    older = {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling}
    for spelled in (older, {"rope_theta": None, "rope_scaling": None}):
        with pytest.raises(ValueError, match="longrope are not those that rotate the first dimensions"):
            model_from_hf(config | spelled | {"rope_parameters": parameters})


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "longrope"}], ids=str)
def test_spellings_that_contradict_each_other_are_refused(scaling: dict[str, Any]) -> None:
    """transformers takes rope_scaling where it has both."""
    config = native_config(tiny(), torch.float32, 64)
    with pytest.raises(ValueError, match=r"^rope_parameters and rope_scaling contradict each other"):
        model_from_hf(config | {"rope_scaling": scaling})
    with pytest.raises(ValueError, match=r"^rope_scaling = .* only the default kind is supported$"):
        model_from_hf(config | {"rope_parameters": None})


def test_angles_of_far_tokens() -> None:
    """M1's own shape, up to a million tokens: as near to the true angles as fp32 lets any reader be.

    A frequency has one rounding of a factor, of a product, of a quotient and of a power, the power twice as large; the
    angle, as many times the position, has one more. That is 6 * 2^-24 of the angle, and its cosine and sine a rounding
    of their own; the model's rotation is held to the same.
    """
    parameters = rotary.rope_parameters(base=1e7, rotated=64, head_dim=128, max_positions=1 << 20)
    config = MiniMaxConfig(head_dim=128, rope_parameters=parameters, max_position_embeddings=1 << 20)
    theirs = MiniMaxRotaryEmbedding(config)
    assert theirs.attention_scaling == 1.0
    true = 1e7 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert torch.all((theirs.inv_freq[:32] / true - 1).abs() < 5 * 2.0**-24)
    positions = torch.cat((torch.arange(0, 1_000_000, 997), torch.tensor([1_000_000])))
    angles = positions.double()[:, None] * true
    bound = 6 * 2.0**-24 * angles + 2.0**-23
    cos, sin = (part[0] for part in theirs(torch.zeros(1), positions[None]))  # [n, 128], both halves alike
    ones = torch.cat((torch.ones(32), torch.zeros(96))).expand(len(positions), 1, 128)
    ours = rotate(ones, positions, 64, 1e7)[:, 0]  # cosines, then sines
    for turned in ((cos[:, :32], sin[:, :32]), (cos[:, 64:96], sin[:, 64:96]), (ours[:, :32], ours[:, 32:64])):
        for got, wanted in zip(turned, (angles.cos(), angles.sin()), strict=True):
            assert torch.all((got - wanted).abs() <= bound)
    for rest in (slice(32, 64), slice(96, 128)):
        assert torch.all(cos[:, rest] == 1) and torch.all(sin[:, rest] == 0)
