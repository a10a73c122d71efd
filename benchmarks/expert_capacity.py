"""How many of the routers' choices a capacity drops: each rank's own against one that all ranks share.

README.md says what is compared. Run ``python benchmarks/expert_capacity.py``; it takes some minutes, and some
more to train ``runs/tiny`` if it is not there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks.common

from benchmarks.common.routing import (  # noqa: E402
    Skew,
    choices_of_checkpoint,
    mean_dropped,
    simulate_choices,
    waiting,
)
from benchmarks.tiny_loss import train  # noqa: E402
from megatron_m1.config.presets import m1_456b  # noqa: E402
from megatron_m1.files import write_atomically  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FACTORS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0)
RANKS = (2, 4, 8, 16, 32)
TOKENS = (512, 2048, 8192)
"""Of a rank's micro-batch, simulated."""
TINY_TOKENS = (128, 512)
"""Of a rank's micro-batch, recorded: a quarter of a pack, and a pack."""
TINY_PACKS = 64
ZIPFS = (0.0, 0.3, 0.6, 1.0)
TOPICS = (0.0, 0.5, 1.0)
SEEDS = (1, 2)
SHOWN = {"tokens": 2048, "topic": 1.0}
"""What the table and the picture have of the simulated settings, next to all Zipf exponents."""
Rows = list[dict[str, Any]]


def drops(counts: Tensor, block: int, tokens: int, topk: int) -> Rows:
    """All ranks and factors for micro-batches of ``tokens``; ``counts`` [blocks, experts] of ``block`` tokens each."""
    together = tokens // block
    whole = len(counts) // together * together
    micro_batches = counts[:whole].view(-1, together, counts.shape[1]).sum(1)
    return [
        {
            "tokens": tokens,
            "ranks": ranks,
            "factor": factor,
            **asdict(mean_dropped(micro_batches, ranks, tokens, topk, factor)),
        }
        for ranks in RANKS
        for factor in FACTORS
    ]


def simulated() -> Rows:
    """M1's 32 experts, two a token."""
    model = m1_456b()
    experts, topk = model.num_moe_experts, model.moe_router_topk
    rows = []
    for zipf in ZIPFS:
        for topic in TOPICS:
            stream = max(RANKS) * max(TOKENS)
            counts = torch.cat(
                [waiting(simulate_choices(stream, experts, topk, Skew(zipf, topic), seed), TOKENS[0]) for seed in SEEDS]
            )
            load = counts.sum(0) / counts.sum() * experts
            for tokens in TOKENS:
                setting = {"source": "simulated", "zipf": zipf, "topic": topic, "busiest": float(load.max())}
                rows += [setting | row for row in drops(counts, TOKENS[0], tokens, topk)]
            print(f"simulated zipf {zipf} topic {topic}", flush=True)
    return rows


def recorded(run: Path) -> Rows:
    """The trained tiny model's 8 experts, layer by layer."""
    chosen, topk = choices_of_checkpoint(run, TINY_PACKS)
    rows = []
    for layer, choices in enumerate(chosen):
        counts = waiting(choices, TINY_TOKENS[0])
        load = counts.sum(0) / counts.sum() * counts.shape[1]
        for tokens in TINY_TOKENS:
            setting = {"source": "tiny", "layer": layer, "busiest": float(load.max())}
            rows += [setting | row for row in drops(counts, TINY_TOKENS[0], tokens, topk)]
    return rows


def check(rows: Rows) -> None:
    """Sharing drops no more, but for capacities that each rank rounds up."""
    for row in rows:
        experts, topk = (32, 2) if row["source"] == "simulated" else (8, 2)
        rounding = experts * (row["ranks"] - 1) / (row["ranks"] * row["tokens"] * topk)
        assert row["shared"] <= row["per_rank"] + rounding + 1e-9, row


def mean_over_layers(rows: Rows) -> Rows:
    """Of the tiny model."""
    found: Rows = []
    layers = len({row["layer"] for row in rows})
    for first in (row for row in rows if row["layer"] == 0):
        same = [row for row in rows if all(row[key] == first[key] for key in ("tokens", "ranks", "factor"))]
        means = {key: sum(row[key] for row in same) / layers for key in ("busiest", "per_rank", "shared")}
        found.append(first | means)
    return found


def select(rows: Rows, **wanted: Any) -> Rows:
    """Rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def table(rows: Rows) -> list[str]:
    """Ranks down, factors across: dropped with each rank's own capacity -> with the shared one."""
    lines = ["| ranks | " + " | ".join(f"{factor}" for factor in FACTORS) + " |", "|--:|" + "--:|" * len(FACTORS)]
    for ranks in RANKS:
        cells = [
            f"{100 * row['per_rank']:.1f} -> {100 * row['shared']:.1f}"
            for factor in FACTORS
            for row in select(rows, ranks=ranks, factor=factor)
        ]
        lines.append(f"| {ranks} | " + " | ".join(cells) + " |")
    return lines


def report(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Choices dropped by capacity: of each rank, and shared by all\n",
        f"{found['date']}, torch {found['torch']}, from fixed seeds; nothing is timed. `../README.md` says what is"
        " compared. Percent of all choices, each rank's own capacity -> the shared one, by capacity factor.",
    ]
    for zipf in ZIPFS:
        rows = select(found["simulated"], zipf=zipf, **SHOWN)
        lines += [
            f"\n### Simulated: 32 experts, {SHOWN['tokens']} tokens a rank, Zipf exponent {zipf},"
            f" topics {SHOWN['topic']} (busiest expert {rows[0]['busiest']:.2f} of the mean)\n",
            *table(rows),
        ]
    for tokens in TINY_TOKENS:
        rows = select(mean_over_layers(found["recorded"]), tokens=tokens)
        lines += [
            f"\n### Recorded: the trained tiny model, 8 experts, {tokens} tokens a rank, mean of its layers (busiest"
            f" expert {rows[0]['busiest']:.2f} of the mean)\n",
            *table(rows),
        ]
    return "\n".join(lines) + "\n"


def draw(axis: Axes, rows: Rows, x: str, line: str, colours: dict[Any, str]) -> None:
    """One colour a value of ``line``; dashed is each rank's own capacity, solid the shared one."""
    for value, colour in colours.items():
        part = select(rows, **{line: value})
        axis.plot([r[x] for r in part], [100 * r["per_rank"] for r in part], "--", color=colour)
        axis.plot([r[x] for r in part], [100 * r["shared"] for r in part], "-", color=colour)
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)
    handles = [Line2D([], [], color=colour, label=f"{value} {line}") for value, colour in colours.items()]
    axis.legend(handles=handles, fontsize=8)


def plot(found: dict[str, Any], path: Path) -> None:
    """Above: by factor. Below: by ranks at 1.25, and the trained model."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 8))
    by_ranks = dict(zip((2, 8, 32), ("tab:orange", "tab:blue", "tab:red"), strict=True))
    for axis, zipf in zip(axes[0], ZIPFS, strict=False):
        draw(axis, select(found["simulated"], zipf=zipf, **SHOWN), "factor", "ranks", by_ranks)
        axis.set_title(f"simulated, {SHOWN['tokens']} tokens a rank, Zipf {zipf}, topics {SHOWN['topic']}", fontsize=9)
        axis.set_xlabel("capacity factor")
    by_tokens = dict(zip(TOKENS, ("tab:orange", "tab:blue", "tab:red"), strict=True))
    for axis, zipf in zip(axes[1], (0.0, 0.3), strict=False):
        rows = select(found["simulated"], zipf=zipf, topic=SHOWN["topic"], factor=1.25)
        draw(axis, rows, "ranks", "tokens", by_tokens)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        axis.set_title(f"simulated, factor 1.25, Zipf {zipf}, topics {SHOWN['topic']}", fontsize=9)
        axis.set_xlabel("ranks")
    tokens = TINY_TOKENS[-1]
    draw(axes[1][2], select(mean_over_layers(found["recorded"]), tokens=tokens), "factor", "ranks", by_ranks)
    axes[1][2].set_title(f"recorded: trained tiny model, {tokens} tokens a rank", fontsize=9)
    axes[1][2].set_xlabel("capacity factor")
    for line in axes:
        line[0].set_ylabel("choices dropped (%)")
    figure.suptitle("Choices dropped: each rank's own capacity (dashed, any number of ranks), a shared one (solid)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Simulate, record, check, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, default=ROOT / "runs" / "tiny", help="folder of the tiny run (default: %(default)s)"
    )
    run = parser.parse_args().run.absolute()
    if not (run / "summary.json").is_file():
        train(run)
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "simulated": simulated(),
        "recorded": recorded(run),
    }
    check(found["simulated"] + found["recorded"])
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / "expert_capacity.json", (json.dumps(found) + "\n").encode())
    write_atomically(RESULTS / "expert_capacity.md", report(found).encode())
    plot(found, RESULTS / "expert_capacity.png")
    print(report(found))


if __name__ == "__main__":
    main()
