"""What context parallelism moves, computes and holds per rank: counted on the layouts that train, for M1's sizes.

Nothing is timed: the same numbers come out on every machine. README.md says what is compared. Run
``python benchmarks/context_parallel.py``; it takes some minutes on 2 cores.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks.common

from benchmarks.common.context_ranks import Case, counted_bytes, predicted_bytes  # noqa: E402
from benchmarks.common.documents import log_normal_lengths  # noqa: E402
from megatron_m1.config.presets import m1_456b  # noqa: E402
from megatron_m1.parallel.balance import ModelCost  # noqa: E402
from megatron_m1.parallel.layout import SequenceLayout  # noqa: E402
from megatron_m1.parallel.traffic import attention_pairs, ring_memory, ring_traffic, state_traffic  # noqa: E402
from megatron_m1.plan.flops import layout_cost  # noqa: E402
from megatron_m1.runtime.pool import WorkerPool  # noqa: E402
from megatron_m1.shapes.registry import layer_mixers  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
MODEL = m1_456b()
COST = layout_cost(MODEL)
RANKS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
TABLE_RANKS = (2, 4, 8, 16, 32, 64)
LENGTHS = {"128K": 2**17, "1M": 2**20}
HEADS, GROUPS, DIM = MODEL.num_attention_heads, MODEL.num_query_groups, MODEL.kv_channels
TOKEN = 2 * GROUPS * DIM * 2
"""Bytes of one token's keys and values in bf16."""
GRADIENT = 2 * GROUPS * DIM * 4
"""Bytes of their gradients in float32."""
STATE = HEADS * DIM * DIM * 4
MEASURED_TOKENS, MEASURED_RANKS = 8400, (2, 3, 4, 5, 6, 7, 8)
BYTES = ("softmax_received", "softmax_received_mean", "lightning_received", "memory")
"""Fields of a row that are plotted in MiB."""
OURS = "ours"
SCHEMES = (OURS, "plain ring", "padded ring", "all-gather K/V", "all-to-all")
LINES = {
    OURS: ("black", "-", 1.5),
    "plain ring": ("tab:orange", "-", 9.0),
    "padded ring": ("tab:red", "--", 3.5),
    "all-gather K/V": ("tab:green", "-", 6.0),
    "all-to-all": ("tab:purple", ":", 2.5),
}
"""Colour, style and width; lines that often coincide differ in width, the thickest below, ours on top."""


def short_documents(tokens: int, seed: int) -> list[int]:
    """Lengths, log-normal with mean 2K and sigma 1.5, that fill ``tokens``; the last one is cut."""
    return log_normal_lengths(tokens, 2048, 1.5, np.random.default_rng(seed))


def pack(kind: str, tokens: int) -> list[int]:
    """Document bounds of a pack, from fixed seeds."""
    if kind == "one document":
        lengths = [tokens]
    elif kind == "log-normal":
        lengths = short_documents(tokens, 1)
    else:
        long = 3 * tokens // 10
        lengths = short_documents(tokens - long, 2)
        lengths.insert(int(np.random.default_rng(3).integers(len(lengths) + 1)), long)
    return [0, *np.cumsum(lengths).tolist()]


KINDS = ("one document", "log-normal", "70% short, 30% long")


@dataclass
class Row:
    """One scheme on one pack: the most that any rank has, and the mean where both are telling."""

    pack: str
    tokens: int
    ranks: int
    scheme: str
    softmax_received: int
    """Bytes that the rank with the most receives in a softmax layer, forward."""
    softmax_sent: int
    """Bytes that the rank with the most sends in a softmax layer, forward."""
    softmax_received_mean: float
    step_received: int
    """Bytes received in all softmax layers, forward and backward."""
    lightning_received: int
    """Bytes received in a lightning layer, forward."""
    hops: int
    """Exchanges of a softmax layer, forward, that follow each other."""
    attention_work: float
    """Pairs of the busiest rank over the mean of the useful ones."""
    model_work: float
    """FLOPs of the busiest rank over the mean of the useful ones, whole model."""
    segments: int
    padded: int
    """Tokens added to the pack."""
    memory: int
    """Bytes of other ranks' tokens, states and gradients held at once in the hungriest layer."""


def pad(bounds: list[int], ranks: int) -> list[int]:
    """A pack that ``ranks`` divide: what is missing follows as a document of its own, as in training."""
    missing = -bounds[-1] % ranks
    return [*bounds, bounds[-1] + missing] if missing else bounds


def ours(kind: str, tokens: int, bounds: list[int], ranks: int) -> tuple[Row, dict[str, Any]]:
    """Counted on the layout of every rank: the most and the mean, and every rank's figures.

    Args:
        kind: of pack.
        tokens: of the pack without padding.
        bounds: of the pack as ranks divide it.
        ranks: that share it.
    """
    layouts = [
        SequenceLayout.build(bounds, context_parallel_size=ranks, context_parallel_rank=rank, cost=COST)
        for rank in range(ranks)
    ]
    plans = [layout.ring_plan for layout in layouts]
    forward, backward = zip(
        *(ring_traffic(plan, token_bytes=TOKEN, gradient_bytes=GRADIENT) for plan in plans), strict=True
    )
    states, _ = state_traffic(layouts[0].state_plan, ranks, state_bytes=STATE)
    pairs = [attention_pairs(plan) for plan in plans]
    received = [way.received for way in forward]
    gathered = layouts[0].state_plan.forward.slots * ranks * STATE
    memory = [max(gathered, ring_memory(plan, token_bytes=TOKEN, gradient_bytes=GRADIENT)) for plan in plans]
    row = Row(
        kind, tokens, ranks, OURS,
        softmax_received=max(received),
        softmax_sent=max(way.sent for way in forward),
        softmax_received_mean=statistics.mean(received),
        step_received=softmax_layers() * max(a.received + b.received for a, b in zip(forward, backward, strict=True)),
        lightning_received=states.received,
        hops=max(len(plan.steps) for plan in plans),
        attention_work=max(pairs) / statistics.mean(pairs),
        model_work=whole(max(pairs), bounds[-1] / ranks) / whole(statistics.mean(pairs), bounds[-1] / ranks),
        segments=layouts[0].segments_per_rank,
        padded=bounds[-1] - tokens,
        memory=max(memory),
    )  # fmt: skip
    by_rank = {
        "softmax_received": received,
        "softmax_sent": [way.sent for way in forward],
        "softmax_received_backward": [way.received for way in backward],
        "softmax_sent_backward": [way.sent for way in backward],
        "hops": [len(plan.steps) for plan in plans],
        "attention_pairs": pairs,
        "model_flops": [whole(own, bounds[-1] / ranks) for own in pairs],
        "memory": memory,
    }
    return row, {"pack": kind, "tokens": tokens, "ranks": ranks, **by_rank}


def softmax_layers() -> int:
    """Of the whole model."""
    return layer_mixers(MODEL).count("softmax")


def whole(pairs: float, tokens: float, cost: ModelCost = COST) -> float:
    """FLOPs of the whole model on a rank."""
    return cost.per_token * tokens + cost.per_pair * pairs


def others(kind: str, nominal: int, bounds: list[int], ranks: int) -> list[Row]:
    """The schemes of other systems, by their formulas. Where a scheme leaves a choice, it gets the better one.

    Lightning layers of all but the last are given LASP+ with two segments a rank, which their systems do not have.
    """
    tokens, lengths = bounds[-1], np.diff(bounds)
    local = tokens // ranks
    useful = float((lengths * (lengths + 1) // 2).sum()) / ranks
    zigzag = [
        SequenceLayout.build(bounds, context_parallel_size=ranks, context_parallel_rank=rank) for rank in range(ranks)
    ]
    pairs = max(attention_pairs(layout.ring_plan) for layout in zigzag)
    lasp = state_traffic(zigzag[0].state_plan, ranks, state_bytes=STATE)[0].received
    gathered = zigzag[0].state_plan.forward.slots * ranks * STATE
    padded_lengths = -(-lengths // (2 * ranks)) * 2 * ranks
    padded_local = int(padded_lengths.sum()) // ranks
    padded_pairs = float((padded_lengths * (padded_lengths + 1) // 2).sum()) / ranks

    def row(
        scheme: str, received: int, step: int, hops: int, work: tuple[float, float], memory: int, **more: int
    ) -> Row:
        own_pairs, own_tokens = work
        values: dict[str, Any] = dict(
            lightning_received=lasp, segments=2, padded=tokens - nominal, softmax_sent=received
        ) | more  # fmt: skip
        return Row(
            kind, nominal, ranks, scheme,
            softmax_received=received,
            softmax_received_mean=received,
            step_received=softmax_layers() * step,
            hops=hops,
            attention_work=own_pairs / useful,
            model_work=whole(own_pairs, own_tokens) / whole(useful, tokens / ranks),
            memory=memory,
            **values,
        )  # fmt: skip

    # Backward, keys and values go round once more, and their float32 gradients go all the way home.
    ring, padded_ring = ((ranks - 1) * n * TOKEN for n in (local, padded_local))
    home, padded_home = (ranks * n * GRADIENT for n in (local, padded_local))
    two_blocks, two_padded = (2 * n * (TOKEN + GRADIENT) for n in (local, padded_local))
    rows = [
        row("plain ring", ring, 2 * ring + home, ranks - 1, (pairs, local), max(gathered, two_blocks)),
        row("padded ring", padded_ring, 2 * padded_ring + padded_home, ranks - 1, (padded_pairs, padded_local),
            max(gathered, two_padded), padded=int((padded_lengths - lengths).sum())),
        row("all-gather K/V", ring, 2 * ring + (ranks - 1) * local * GRADIENT, 1, (pairs, local),
            max(gathered, tokens * (TOKEN + GRADIENT))),
    ]  # fmt: skip
    if HEADS % ranks == 0:
        # Key/value heads are copied where there are fewer than ranks.
        heads = 2 * HEADS + 2 * max(GROUPS, ranks)
        exchange = (ranks - 1) * local * heads * DIM * 2 // ranks
        lightning = (ranks - 1) * local * 4 * HEADS * DIM * 2 // ranks
        held = tokens * 4 * HEADS // ranks * DIM * 2
        rows.append(
            row(
                "all-to-all", exchange, 2 * exchange, 2, (useful, local), held, lightning_received=lightning, segments=1
            )
        )
    return rows


def count() -> tuple[list[Row], list[dict[str, Any]]]:
    """All rows, and ours rank by rank."""
    rows, ranked = [], []
    for tokens in LENGTHS.values():
        for kind in KINDS:
            for ranks in RANKS:
                bounds = pad(pack(kind, tokens), ranks)
                mine, by_rank = ours(kind, tokens, bounds, ranks)
                rows += [mine, *others(kind, tokens, bounds, ranks)]
                ranked.append(by_rank)
                print(f"{kind} {tokens} {ranks}", flush=True)
    return rows, ranked


def measure() -> list[dict[str, Any]]:
    """Bytes that go through real process groups, and those of the plans; they have to be equal."""
    pool, found = WorkerPool(preloaded=["megatron_m1.training.loop"]), []
    only_pairs = ModelCost(0.0, 1.0, 0.0)
    try:
        for ranks in MEASURED_RANKS:
            cases = [
                Case(pack(kind, MEASURED_TOKENS), only_pairs, heads=4, groups=2, dim=8, dtype=torch.float32)
                for kind in KINDS
            ]
            by_rank = pool.run(counted_bytes, cases, world_size=ranks, timeout=600.0)
            for index, (kind, case) in enumerate(zip(KINDS, cases, strict=True)):
                for rank in range(ranks):
                    counted, predicted = by_rank[rank][index], predicted_bytes(rank, ranks, case)
                    if counted != predicted:
                        raise SystemExit(f"{kind}, rank {rank} of {ranks}: {counted} went, {predicted} were predicted")
                    found.append({"pack": kind, "ranks": ranks, "rank": rank, "counted = predicted": counted})
    finally:
        pool.close()
    return found


def check(rows: list[Row]) -> None:
    """The claims of README.md."""
    for row in rows:
        if row.scheme != OURS:
            continue
        plain = next(
            r for r in rows if (r.pack, r.tokens, r.ranks, r.scheme) == (row.pack, row.tokens, row.ranks, "plain ring")
        )
        assert row.padded < row.ranks and row.softmax_received <= plain.softmax_received
        assert row.step_received <= plain.step_received and row.model_work <= plain.model_work * 1.0001
        same = {
            r.lightning_received
            for r in rows
            if (r.pack, r.ranks, r.scheme, r.segments) == (KINDS[0], row.ranks, OURS, 2)
        }
        assert len(same) == 1, "LASP+ depends on segments, not on the length"


def in_words(n: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if n >= 10 or n == 0 else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = []
    for name, tokens in LENGTHS.items():
        for kind in KINDS:
            lines += [
                f"\n### {name} tokens, {kind}\n",
                "| ranks | scheme | softmax layer, received (mean) | sent | softmax layers, step | lightning layer |"
                " hops | attention max/useful | model max/useful | segments | padded | memory |",
                "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
            ]
            for r in rows:
                if (r.pack, r.tokens) == (kind, tokens) and r.ranks in TABLE_RANKS:
                    received = f"{in_words(r.softmax_received)} ({in_words(r.softmax_received_mean)})"
                    lines.append(
                        f"| {r.ranks} | {r.scheme} | {received} | {in_words(r.softmax_sent)} "
                        f"| {in_words(r.step_received)} | {in_words(r.lightning_received)} | {r.hops} "
                        f"| {r.attention_work:.3f} | {r.model_work:.3f} | {r.segments} | {r.padded} "
                        f"| {in_words(r.memory)} |"
                    )
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], field: str, title: str, path: Path, *, log: bool, mean: str | None = None) -> None:
    """One panel a pack, one line a scheme, and one for our mean where ``mean`` names its field."""
    figure, axes = plt.subplots(len(LENGTHS), len(KINDS), figsize=(13, 7), sharex=True, sharey=True, squeeze=False)
    for line, (name, tokens) in zip(axes, LENGTHS.items(), strict=True):
        for axis, kind in zip(line, KINDS, strict=True):
            for scheme in SCHEMES:
                part = [r for r in rows if (r.pack, r.tokens, r.scheme) == (kind, tokens, scheme)]
                colour, style, width = LINES[scheme]
                values = [r.ranks for r in part], [getattr(r, field) for r in part]
                marker = {"marker": "o", "ms": 4} if scheme == OURS else {}
                axis.plot(*values, style, label=scheme, color=colour, lw=width, zorder=12 - width, **marker)
            if mean is not None:
                part = [r for r in rows if (r.pack, r.tokens, r.scheme) == (kind, tokens, OURS)]
                values = [r.ranks for r in part], [getattr(r, mean) for r in part]
                axis.plot(*values, "--", label="ours, mean of the ranks", color="black", lw=1.0, zorder=11)
            axis.set_xscale("log", base=2)
            axis.set_xticks(TABLE_RANKS, [str(ranks) for ranks in TABLE_RANKS])
            axis.minorticks_off()
            if log:
                axis.set_yscale("log", base=2)
            axis.grid(alpha=0.3)
            axis.set_title(f"{name} tokens, {kind}", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("context-parallel ranks")
    figure.suptitle(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plots(rows: list[Row]) -> None:
    """All of them; bytes in MiB."""
    scaled = [Row(**(asdict(r) | {f: getattr(r, f) / 2**20 for f in BYTES})) for r in rows]
    start = RESULTS / "context_parallel"
    plot(scaled, "softmax_received", "Received by the busiest rank in a softmax layer, forward (MiB)",
         Path(f"{start}_softmax_bytes.png"), log=True, mean="softmax_received_mean")  # fmt: skip
    plot(scaled, "lightning_received", "Received by a rank in a lightning layer, forward (MiB)",
         Path(f"{start}_lightning_bytes.png"), log=True)  # fmt: skip
    plot(rows, "model_work", "Whole-model FLOPs of the busiest rank over the useful mean",
         Path(f"{start}_balance.png"), log=False)  # fmt: skip
    plot(scaled, "memory", "Held of other ranks in the hungriest layer (MiB)",
         Path(f"{start}_memory.png"), log=True)  # fmt: skip


def main() -> None:
    """Count, measure, check, write."""
    tests = ["tests/parallel/test_plans.py", "tests/parallel/test_traffic.py"]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, check=True)
    rows, ranked = count()
    check(rows)
    measured = measure()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "context_parallel.json").write_text(
        json.dumps({"rows": [asdict(row) for row in rows], "ours by rank": ranked, "measured": measured}) + "\n"
    )
    (RESULTS / "context_parallel.md").write_text(
        "# Context parallelism, counted for MiniMax-M1 (456B), TP 1\n\n"
        "The busiest rank's figures; `../README.md` says what is compared.\n" + table(rows)
    )
    plots(rows)
    print(table(rows))


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
