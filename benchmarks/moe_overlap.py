"""How much of an expert layer's communication token groups hide: modelled for M1 on GPUs, measured on slow CPU links.

README.md says what is modelled and what is measured. Run ``python benchmarks/moe_overlap.py``; it takes some minutes.
"""

from __future__ import annotations

import datetime
import itertools
import json
import multiprocessing
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks.common

from benchmarks.common.expert_costs import GPU, NETWORKS, NODE, SOURCES, Host, Layer, Network, layer_times  # noqa: E402
from benchmarks.common.slow_layer import Bench, Pace, measure  # noqa: E402
from megatron_m1.config.presets import m1_456b  # noqa: E402
from megatron_m1.files import write_atomically  # noqa: E402
from megatron_m1.runtime.pool import WorkerPool  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
GROUPS = (1, 2, 4, 8)
MORE_GROUPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MESHES = [(expert, tensor) for tensor in (1, 2, 4) for expert in (8, 16, 32)]
TOKENS = (8192, 2048)
CALLS = (2e-6, 10e-6, 50e-6)
"""Seconds of the process for one call of torch; a collective takes four times as long."""
RATES = tuple(400e9 / 2 ** (step / 2) for step in range(18))
LATENCIES = (10e-6, 100e-6, 1e-3)
SWEPT = [(8, 1), (32, 1), (8, 2)]
MARKS = {
    "NVLink\nH100": 320e9,
    "NVLink\nH800": 155e9,
    "InfiniBand": 46e9,
    "Ethernet": 11.5e9,
    "Ethernet\na node": 1.44e9,
}
MEASURED = [Bench(2, 1), Bench(4, 1), Bench(2, 2)]
BUSY = (0.5, 1.0)
"""EP's messages, as a multiple of the products' time."""
ROW_SECONDS, LATENCY = 2e-4, 1e-3
CLAIMS = (
    (
        "MiniMax-01 (arXiv 2501.08313), section 3.1",
        "EP-ETP overlap",
        "pure communication of the MoE part halved: half of it hidden; mesh, groups and network not published",
    ),
    (
        "Megatron-LM #7342 (open; figures in ISEEKYAN/Megatron-LM #225)",
        "ChunkedEP, two chunks, EP8, no ETP",
        "whole step 1.135 times as fast, Qwen3 MoE of 48 layers on 16 H100, full recomputation;"
        " the gradient norm of the eighth step differs by 9.5%",
    ),
    (
        "Megatron-Bridge #3862",
        "two micro-batches beside each other, no ETP",
        "whole step 1.317 times as fast, 1.322 with late weights' gradients (a short run of Qwen3 30B-A3B)",
    ),
)
Rows = list[dict[str, Any]]


def m1_layer(expert_ranks: int, tensor_ranks: int, tokens: int = TOKENS[0], *, recompute: bool = False) -> Layer:
    """M1's, with ``tokens`` a rank."""
    model = m1_456b()
    assert model.num_moe_experts is not None
    return Layer(
        expert_ranks, tensor_ranks, tokens, model.hidden_size, model.moe_ffn_hidden_size, model.num_moe_experts,
        model.moe_router_topk, recompute,
    )  # fmt: skip


def networks(layer: Layer) -> tuple[Network, ...]:
    """Those that differ for the layer: in one node only NVLink does."""
    if layer.expert_ranks * layer.tensor_ranks > NODE:
        return NETWORKS
    return tuple(replace(net, name=f"{net.name.split(',')[0]}, one node") for net in NETWORKS[:2])


def best_groups(layer: Layer, network: Network, host: Host, *, fused_totals: bool = False) -> tuple[int, float]:
    """The fastest number of groups, and its speedup over nothing overlapping; within 0.5%, the smallest."""
    found = {g: layer_times(layer, network, g, host=host, fused_totals=fused_totals).speedup for g in MORE_GROUPS}
    most = max(found.values())
    return next((groups, speedup) for groups, speedup in found.items() if speedup > 0.995 * most)


def modelled() -> Rows:
    """Every mesh on every network."""
    rows = []
    for expert, tensor in MESHES:
        for recompute in (False, True):
            layer = m1_layer(expert, tensor, recompute=recompute)
            for network in networks(layer):
                times, fused_times = (
                    {groups: layer_times(layer, network, groups, fused_totals=inside) for groups in GROUPS}
                    for inside in (False, True)
                )
                best, speedup = best_groups(layer, network, Host())
                fused, fused_speedup = best_groups(layer, network, Host(), fused_totals=True)
                rows.append(
                    {
                        "EP": expert, "ETP": tensor, "recompute": recompute, "network": network.name,
                        "products_s": times[1].products, "travel_s": times[1].travel,
                        "hidden": {groups: found.hidden for groups, found in times.items()},
                        "speedup": {groups: found.speedup for groups, found in times.items()},
                        "best_groups": best, "best_speedup": speedup,
                        "hidden_fused": {groups: found.hidden for groups, found in fused_times.items()},
                        "best_groups_fused": fused, "best_speedup_fused": fused_speedup,
                    }
                )  # fmt: skip
    return rows


def too_many() -> Rows:
    """Which number of groups is best where tokens are few and issuing is slow, as MiniMax-01 warns (section 3.1)."""
    rows = []
    for expert, tensor, fused in itertools.product((8, 32), (1, 2), (False, True)):
        for tokens, call in itertools.product(TOKENS, CALLS):
            layer, host = m1_layer(expert, tensor, tokens), Host(call, 4 * call)
            speedups = {
                g: layer_times(layer, NETWORKS[1], g, host=host, fused_totals=fused).speedup for g in (*GROUPS, 16, 32)
            }
            best, speedup = best_groups(layer, NETWORKS[1], host, fused_totals=fused)
            rows.append(
                {
                    "EP": expert, "ETP": tensor, "fused": fused, "tokens": tokens, "call_s": call,
                    "speedup": speedups, "best_groups": best, "best_speedup": speedup,
                }
            )  # fmt: skip
    return rows


def sweep() -> Rows:
    """One rate and latency for EP's messages, wherever they go; ETP stays on the H800's NVLink."""
    rows = []
    for expert, tensor in SWEPT:
        layer = m1_layer(expert, tensor)
        for latency in LATENCIES:
            for rate in RATES:
                network = Network("sweep", rate, latency, rate, latency)
                if tensor > 1:
                    # Half of EP's messages stay in the node, where they are faster; the others take as long as told.
                    network = replace(NETWORKS[1], outside=rate, outside_latency=latency)
                hidden, fused = (
                    {groups: layer_times(layer, network, groups, fused_totals=inside).hidden for groups in GROUPS}
                    for inside in (False, True)
                )
                rows.append(
                    {
                        "EP": expert, "ETP": tensor, "latency_s": latency, "rate": rate, "hidden": hidden,
                        "hidden_fused": fused,
                    }
                )  # fmt: skip
    return rows


def measured() -> Rows:
    """Processes on this machine, with links and experts that are slow on purpose, beside what the lists say."""
    pool, rows = WorkerPool(preloaded=["benchmarks.common.slow_layer"]), []
    try:
        for bench in MEASURED:
            for busy in BUSY:
                load = bench.load
                products = 3 * load.rows * load.tensor_ranks * ROW_SECONDS
                sent = 4 * load.rows * load.row_bytes * (load.expert_ranks - 1) / load.expert_ranks
                pace = Pace(ROW_SECONDS, LATENCY, sent / (busy * products))
                arguments = (bench, pace, list(GROUPS), 2)
                off, seconds = pool.run(measure, *arguments, world_size=bench.ranks, timeout=300.0)[0]
                simulated = [load.simulated(groups, pace) for groups in GROUPS]
                serial = load.one_after_the_other(pace)
                travel = serial - products
                rows.append(
                    {
                        "EP": bench.expert_ranks, "ETP": bench.tensor_ranks, "busy": busy, "pace": asdict(pace),
                        "off_s": off, "off_simulated_s": serial,
                        "seconds": dict(zip(GROUPS, seconds, strict=True)),
                        "simulated_s": dict(zip(GROUPS, simulated, strict=True)),
                        "hidden": {g: (off - s) / travel for g, s in zip(GROUPS, seconds, strict=True)},
                        "hidden_simulated": {g: (serial - s) / travel for g, s in zip(GROUPS, simulated, strict=True)},
                    }
                )  # fmt: skip
                print(f"measured EP{bench.expert_ranks} ETP{bench.tensor_ranks} {busy}", flush=True)
    finally:
        pool.close()
    return rows


def percent(shares: dict[int, float]) -> str:
    """Cells of a table."""
    return " | ".join(f"{100 * share:.0f}%" for share in shares.values())


def modelled_table(rows: Rows) -> list[str]:
    """Every mesh and network."""
    lines = [
        "## Modelled: M1's layer on GPUs\n",
        f"Nothing here ran on a GPU. {TOKENS[0]} tokens a rank, bf16, forward and backward, nothing recomputed (with"
        " recomputation: in the JSON file). Milliseconds of all products and of all messages one after the other; the"
        " share hidden by G groups, where the stock layer's is 0% and what groups cost is taken off; the best G of "
        + ", ".join(map(str, MORE_GROUPS))
        + " and its speedup over the stock order; the same if products added to the weights' float32 gradients, which"
        " makes no difference to G = 1 (fused).\n",
        "| EP | ETP | network | products | messages | "
        + " | ".join(f"G = {g}" for g in GROUPS)
        + " | best G | times as fast | fused: "
        + " | ".join(f"G = {g}" for g in GROUPS[1:])
        + " | best G | times as fast |",
        "|--:|--:|---|--:|--:|" + "--:|" * (2 * len(GROUPS) + 3),
    ]
    lines += [
        f"| {r['EP']} | {r['ETP']} | {r['network']} | {1e3 * r['products_s']:.1f} | {1e3 * r['travel_s']:.1f}"
        f" | {percent(r['hidden'])} | {r['best_groups']} | {r['best_speedup']:.2f}"
        f" | {percent({g: r['hidden_fused'][g] for g in GROUPS[1:]})}"
        f" | {r['best_groups_fused']} | {r['best_speedup_fused']:.2f} |"
        for r in rows
        if not r["recompute"]
    ]
    return lines


def too_many_table(rows: Rows) -> list[str]:
    """By tokens and by what a call takes."""
    counts = (*GROUPS, 16, 32)
    lines = [
        "\n### Too many groups\n",
        "H800 with 400 Gb/s InfiniBand; times as fast as with nothing overlapping.\n",
        "| EP | ETP | fused | tokens a rank | a call of torch | "
        + " | ".join(f"G = {g}" for g in counts)
        + " | best G |",
        "|--:|--:|---|--:|--:|" + "--:|" * (len(counts) + 1),
    ]
    lines += [
        f"| {r['EP']} | {r['ETP']} | {'yes' if r['fused'] else 'no'} | {r['tokens']} | {1e6 * r['call_s']:.0f} us | "
        + " | ".join(f"{r['speedup'][g]:.2f}" for g in counts)
        + f" | {r['best_groups']} |"
        for r in rows
    ]
    return lines


def measured_table(rows: Rows, machine: str) -> list[str]:
    """Measured beside simulated."""
    lines = [
        "\n## Measured: slow links on CPU processes\n",
        f"{machine}, gloo. Messages and experts are slowed down by sleeping"
        f" ({1e6 * ROW_SECONDS:.0f} us a row and pass, {1e3 * LATENCY:.0f} ms a message), so that the processor is a"
        " small part. In each cell: share hidden as measured, as simulated, and measured over simulated time.\n",
        "| EP | ETP | EP's messages / products | off: measured / simulated | "
        + " | ".join(f"G = {g}" for g in GROUPS)
        + " | off / G = 8 |",
        "|--:|--:|--:|--:|" + "--:|" * (len(GROUPS) + 1),
    ]
    for r in rows:
        cells = [
            f"{100 * r['hidden'][g]:.0f}%, {100 * r['hidden_simulated'][g]:.0f}%,"
            f" {r['seconds'][g] / r['simulated_s'][g]:.2f}"
            for g in GROUPS
        ]
        lines.append(
            f"| {r['EP']} | {r['ETP']} | {r['busy']} | {r['off_s'] / r['off_simulated_s']:.2f} | "
            + " | ".join(cells)
            + f" | {r['off_s'] / r['seconds'][8]:.2f} |"
        )
    return lines


def report(found: dict[str, Any]) -> str:
    """Markdown."""
    setup = found["setup"]
    lines = [
        "# What token groups hide of an expert layer's communication\n",
        f"{setup['date']}, torch {setup['torch']}, Python {setup['python']}. `../README.md` says what is compared.\n",
        *modelled_table(found["modelled"]),
        *too_many_table(found["too_many"]),
        "\n### Figures that went in\n",
        "| what | value | source |",
        "|---|---|---|",
        *(f"| {name} | {value} | {source} |" for name, value, source in SOURCES),
        "\n## What others say\n",
        "| who | what | result |",
        "|---|---|---|",
        *(f"| {who} | {what} | {result} |" for who, what, result in CLAIMS),
        *measured_table(found["measured"], f"{setup['processor']}, {setup['cores']} cores"),
    ]
    return "\n".join(lines) + "\n"


def plot(rows: Rows, path: Path) -> None:
    """The sweep: one panel a mesh and latency, one line a number of groups."""
    figure, axes = plt.subplots(len(SWEPT), len(LATENCIES), figsize=(13, 10), sharex=True, sharey=True, squeeze=False)
    for line, (expert, tensor) in zip(axes, SWEPT, strict=True):
        for axis, latency in zip(line, LATENCIES, strict=True):
            part = [r for r in rows if (r["EP"], r["ETP"], r["latency_s"]) == (expert, tensor, latency)]
            for groups, colour in zip(GROUPS, ("tab:gray", "tab:orange", "tab:blue", "tab:red"), strict=True):
                rates = [r["rate"] / 1e9 for r in part]
                axis.plot(rates, [100 * r["hidden"][groups] for r in part], color=colour, label=f"G = {groups}")
                axis.plot(rates, [100 * r["hidden_fused"][groups] for r in part], color=colour, ls=":")
            axis.axhline(50, color="black", lw=1, ls="--", label="MiniMax-01's claim")
            for name, rate in MARKS.items():
                axis.axvline(rate / 1e9, color="black", lw=0.5, ls=":")
                axis.text(rate / 1e9, -18, name, rotation=90, fontsize=6.5, ha="right", va="bottom")
            axis.set_xscale("log")
            axis.set_ylim(-20, 100)
            axis.set_title(f"EP {expert}, ETP {tensor}, latency {1e6 * latency:.0f} us", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("GB/s of a rank's EP messages")
    figure.suptitle(
        "Modelled: share of an M1 expert layer's communication that is hidden (%), 8K tokens a rank;"
        " dotted: products add to the weights' gradients"
    )
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def processor_name() -> str:
    """As the system calls it."""
    found = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    names = [line.partition(":")[2].strip() for line in found.splitlines() if line.startswith("Model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Model, measure, write."""
    torch.set_num_threads(1)
    tests = ["tests/parallel/expert/test_schedule.py", "tests/parallel/expert/test_costs.py"]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, check=True)
    found: dict[str, Any] = {
        "setup": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "torch": torch.__version__,
            "python": platform.python_version(), "processor": processor_name(), "cores": multiprocessing.cpu_count(),
            "gpu": asdict(GPU), "networks": [asdict(net) for net in NETWORKS],
        },
        "modelled": modelled(), "too_many": too_many(), "sweep": sweep(), "measured": measured(),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / "moe_overlap.json", (json.dumps(found) + "\n").encode())
    write_atomically(RESULTS / "moe_overlap.md", report(found).encode())
    plot(found["sweep"], RESULTS / "moe_overlap.png")
    print(report(found))


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
