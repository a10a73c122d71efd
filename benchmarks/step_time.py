"""Our training step on the CPU against transformers' native MiniMax, and a lightning layer against its length.

Both sides start from the same weights and must agree on loss and gradients before anything is timed. README.md says
what is measured and how to read it. Run ``python benchmarks/step_time.py``; it takes 2 to 3 minutes on 2 cores.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from transformers import MiniMaxConfig, MiniMaxForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks.common

from benchmarks.common.transformers_weights import expected  # noqa: E402
from megatron_m1.config import Config, DataConfig, ModelConfig, OptimizerConfig  # noqa: E402
from megatron_m1.config.resolve import resolve  # noqa: E402
from megatron_m1.data.packed import PackedSample  # noqa: E402
from megatron_m1.layers.pack import PackedBatchParams  # noqa: E402
from megatron_m1.parallel.layout import SequenceLayout  # noqa: E402
from megatron_m1.runtime import mesh  # noqa: E402
from megatron_m1.shapes.registry import layer_mixers  # noqa: E402
from megatron_m1.training.step import compute_gradients, train_step  # noqa: E402
from megatron_m1.training.trained_model import TrainedModel, build_trained_model  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
THREADS = 2
TOKENS = 2048
ALPHA = (2 * 8) ** 0.25
MODEL = ModelConfig(
    num_layers=8,
    hidden_size=512,
    num_attention_heads=8,
    kv_channels=64,
    num_query_groups=2,
    moe_ffn_hidden_size=1024,
    num_moe_experts=8,
    vocab_size=8192,
    rotary_percent=1.0,  # transformers rotates whole heads
    residual_alpha=ALPHA,
)
LAYER_TYPES = {"lightning": "linear_attention", "softmax": "full_attention"}
LEARNING_RATE = 1e-4
ROUNDS, PACK_ROUNDS, LAYER_ROUNDS = 7, 3, 7
DOCUMENTS = (731, 402, 305, 210, 164, 118, 83, 35)
"""Tokens of the second figure's documents, TOKENS in all: a few long ones and many short ones, as texts come."""
LENGTHS = (1024, 2048, 4096, 8192)
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 2e-4
"""Relative. fp32 roundings over 8 layers; the largest error of a gradient's entries over its largest entry."""


def build_theirs() -> MiniMaxForCausalLM:
    """transformers' model with its own defaults, in training mode."""
    config = MiniMaxConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.moe_ffn_hidden_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_attention_heads,
        num_key_value_heads=MODEL.num_query_groups,
        head_dim=MODEL.kv_channels,
        num_local_experts=MODEL.num_moe_experts,
        num_experts_per_tok=MODEL.moe_router_topk,
        max_position_embeddings=max(LENGTHS),
        rms_norm_eps=MODEL.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": MODEL.rotary_base},
        layer_types=[LAYER_TYPES[kind] for kind in layer_mixers(MODEL)],
        full_attn_alpha_factor=ALPHA,
        linear_attn_alpha_factor=ALPHA,
        mlp_alpha_factor=ALPHA,
    )
    torch.manual_seed(0)
    return MiniMaxForCausalLM(config).train()


def build_ours(theirs: MiniMaxForCausalLM) -> TrainedModel:
    """Our model and optimizer on one process, with transformers' weights and our defaults."""
    config = Config(model=MODEL, optimizer=OptimizerConfig(lr=LEARNING_RATE), data=DataConfig(seq_length=TOKENS))
    resolved = resolve(config, world_size=1, has_gpu=False)
    trained = build_trained_model(resolved, mesh.initialise(resolved.parallel, seed=0))
    parameters = dict(trained.chunks[0].module.named_parameters())
    with torch.no_grad():
        for name, value in expected(theirs):
            parameters.pop(name).copy_(value)
    assert not parameters
    trained.optimizer.reload_model_params()
    return trained


def make_pack(lengths: tuple[int, ...], seed: int) -> PackedSample:
    """Random documents end to end, each followed by a label of its own."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(MODEL.vocab_size, (2, sum(lengths)), generator=generator)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return PackedSample(tokens, labels, torch.ones(sum(lengths)), bounds)


def documents(pack: PackedSample) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of each document, [1, length]."""
    ranges = list(itertools.pairwise(pack.cu_seqlens.tolist()))
    return [(pack.tokens[None, a:b], pack.labels[None, a:b]) for a, b in ranges]


def gradients_alone(theirs: MiniMaxForCausalLM, pack: PackedSample) -> float:
    """transformers on one document after another: the mean loss over the pack's tokens, and its gradients."""
    loss = torch.zeros(())
    for tokens, labels in documents(pack):
        part = theirs(input_ids=tokens, labels=tokens, shift_labels=labels, use_cache=False).loss
        (part * (tokens.numel() / TOKENS)).backward()
        loss += part.detach() * (tokens.numel() / TOKENS)
    return float(loss)


def gradients_padded(theirs: MiniMaxForCausalLM, pack: PackedSample) -> float:
    """transformers on all documents at once, each padded to the longest."""
    longest = max(tokens.numel() for tokens, _ in documents(pack))
    pad = torch.nn.functional.pad
    rows = [
        (pad(t, (0, longest - t.numel())), pad(y, (0, longest - t.numel()), value=-100)) for t, y in documents(pack)
    ]
    tokens, labels = (torch.cat(column) for column in zip(*rows, strict=True))
    loss = theirs(
        input_ids=tokens, attention_mask=(labels >= 0).long(), labels=tokens, shift_labels=labels, use_cache=False
    ).loss
    loss.backward()
    return float(loss.detach())


def require_same_results(theirs: MiniMaxForCausalLM, ours: TrainedModel) -> dict[str, float]:
    """Compare loss and all gradients on a pack of documents, without our auxiliary loss, which theirs lacks.

    Raises:
        ValueError: they differ by more than rounding.
    """
    config, coefficient = ours.chunks[0].config, MODEL.moe_aux_loss_coeff
    pack = make_pack(DOCUMENTS, seed=0)
    config.moe_aux_loss_coeff = 0.0
    (report,), weight = compute_gradients(ours, [pack])
    config.moe_aux_loss_coeff = coefficient
    our_loss = float(report[0]) / weight
    padded_loss = gradients_padded(theirs, pack)
    theirs.zero_grad()
    their_loss = gradients_alone(theirs, pack)
    parameters = dict(ours.chunks[0].module.named_parameters())
    worst = max(
        float((parameters[name].main_grad - gradient).abs().max() / gradient.abs().max())
        for name, gradient in expected(theirs, "grad")
    )
    theirs.zero_grad()
    loss_error = max(abs(our_loss - their_loss), abs(our_loss - padded_loss)) / their_loss
    if not (loss_error <= LOSS_TOLERANCE and worst <= GRADIENT_TOLERANCE):
        raise ValueError(f"refusing to time: losses differ by {loss_error:.1e}, gradients by {worst:.1e}, relative")
    return {"loss": our_loss, "loss_error": loss_error, "gradient_error": worst}


def take_turns(sides: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Call every side once per round, after one call that is not counted; each gets the round's number."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run(turn)
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def summarise(times: Mapping[str, list[float]], scale: float = 1.0) -> dict[str, dict[str, Any]]:
    """Median, extremes and all values of each side, times ``scale``."""
    return {
        str(name): {
            "median": statistics.median(values) * scale,
            "min": min(values) * scale,
            "max": max(values) * scale,
            "all": [round(value * scale, 4) for value in values],
        }
        for name, values in times.items()
    }


class Steps:
    """Whole training steps of both sides: forward, loss, backward, AdamW, gradients forgotten."""

    def __init__(self, theirs: MiniMaxForCausalLM) -> None:
        self.theirs = theirs
        self.optimizer = torch.optim.AdamW(theirs.parameters(), lr=LEARNING_RATE)

    def step_theirs(self, gradients: Callable[[MiniMaxForCausalLM, PackedSample], float], pack: PackedSample) -> None:
        """One step of transformers' model with torch's AdamW and its defaults."""
        gradients(self.theirs, pack)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def one_document(self, turn: int) -> None:
        """transformers on one document of all the tokens, in one call."""
        self.step_theirs(gradients_alone, make_pack((TOKENS,), seed=turn + 1))

    def compare(self, ours: TrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
        """Seconds per step: one document, then a pack of several."""

        def ours_on(lengths: tuple[int, ...]) -> Callable[[int], object]:
            return lambda turn: train_step(ours, [make_pack(lengths, seed=turn + 1)], LEARNING_RATE)

        single = take_turns({"theirs": self.one_document, "ours": ours_on((TOKENS,))}, ROUNDS)
        pack = take_turns(
            {
                "theirs, each alone": lambda turn: self.step_theirs(gradients_alone, make_pack(DOCUMENTS, turn + 1)),
                "theirs, padded": lambda turn: self.step_theirs(gradients_padded, make_pack(DOCUMENTS, turn + 1)),
                "ours": ours_on(DOCUMENTS),
            },
            PACK_ROUNDS,
        )
        return summarise(single), summarise(pack)


def time_lightning_layer(theirs: MiniMaxForCausalLM, ours: TrainedModel) -> dict[str, dict[str, dict[str, Any]]]:
    """Microseconds per token of the whole first layer's attention module, forward and backward, by length.

    Every timing covers as many tokens as the longest sequence has.
    """
    our_layer = ours.chunks[0].module.decoder.layers[0].self_attention
    their_layer = theirs.model.layers[0].self_attn

    def run_ours(length: int) -> None:
        params = PackedBatchParams.of(SequenceLayout.build([0, length]))
        for _ in range(max(LENGTHS) // length):
            x = torch.randn(length, 1, MODEL.hidden_size, requires_grad=True)
            our_layer(x, None, packed_seq_params=params)[0].backward(torch.ones_like(x))

    def run_theirs(length: int) -> None:
        for _ in range(max(LENGTHS) // length):
            x = torch.randn(1, length, MODEL.hidden_size, requires_grad=True)
            their_layer(x, None, None)[0].backward(torch.ones_like(x))
            their_layer.zero_grad()

    def at(length: int, run: Callable[[int], None]) -> Callable[[int], object]:
        return lambda turn: run(length)

    runs = {f"{side} {n}": at(n, run) for n in LENGTHS for side, run in (("ours", run_ours), ("theirs", run_theirs))}
    times = take_turns(runs, LAYER_ROUNDS)
    flat = summarise(times, scale=1e6 / max(LENGTHS))
    return {side: {str(n): flat[f"{side} {n}"] for n in LENGTHS} for side in ("ours", "theirs")}


def plot_lightning_layer(layer: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Time per token against length, median and range."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for side, label in (("theirs", "transformers"), ("ours", "megatron-m1")):
        rows = [layer[side][str(n)] for n in LENGTHS]
        medians = [row["median"] for row in rows]
        spread = [[row["median"] - row["min"] for row in rows], [row["max"] - row["median"] for row in rows]]
        axes.errorbar(LENGTHS, medians, yerr=spread, marker="o", capsize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of one document")
    axes.set_ylabel("microseconds per token")
    axes.set_title(f"Lightning layer, forward + backward, {THREADS} CPU threads, fp32")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def cpu_name() -> str:
    """The processor, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_report(result: dict[str, Any]) -> None:
    """The figures as tables."""
    same = result["same_results"]
    print(f"same loss (to {same['loss_error']:.0e}) and gradients (to {same['gradient_error']:.0e}); times follow")
    for title in ("one document", "pack of 8 documents"):
        figure = result["seconds_per_step"][title]
        print(f"\n{title}, {TOKENS:,} tokens: seconds per step")
        for name, row in figure.items():
            ratio = row["median"] / figure["ours"]["median"]
            print(f"  {name:20}{row['median']:8.3f}   [{row['min']:.3f} .. {row['max']:.3f}]   {ratio:.2f} x ours")
    before = result["theirs_before_our_engine_started"]["median"]
    print(f"\ntheirs, one document, before our engine was started in the process: {before:.3f} s")
    print("\nlightning layer, forward + backward: microseconds per token")
    for side, rows in result["lightning_layer_us_per_token"].items():
        cells = "".join(f"{n:>8}: {row['median']:6.1f}" for n, row in rows.items())
        print(f"  {side:8}{cells}   last / first {result['lightning_growth'][side]:.2f}")


def main() -> None:
    """Measure, print, and write step_time.json and step_time_lightning.png."""
    torch.set_num_threads(THREADS)
    theirs = build_theirs()
    steps = Steps(theirs)
    before = take_turns({"theirs": steps.one_document}, rounds=3)
    ours = build_ours(theirs)
    same = require_same_results(theirs, ours)
    single, pack = steps.compare(ours)
    layer = time_lightning_layer(theirs, ours)
    first, last = str(min(LENGTHS)), str(max(LENGTHS))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": THREADS,
        "versions": {name: version(name) for name in ("torch", "transformers", "megatron-core")}
        | {"python": platform.python_version()},
        "model": {name: value for name, value in vars(MODEL).items() if isinstance(value, int | float)},
        "parameters": sum(p.numel() for p in theirs.parameters()),
        "documents": DOCUMENTS,
        "same_results": same,
        "theirs_before_our_engine_started": summarise(before)["theirs"],
        "seconds_per_step": {"one document": single, "pack of 8 documents": pack},
        "ratio": single["theirs"]["median"] / single["ours"]["median"],
        "lightning_layer_us_per_token": layer,
        "lightning_growth": {side: rows[last]["median"] / rows[first]["median"] for side, rows in layer.items()},
    }
    print_report(result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_time.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_lightning_layer(layer, RESULTS / "step_time_lightning.png")
    mesh.shut_down()


if __name__ == "__main__":
    main()
