"""What the CPU's forms were chosen by: chunk sizes of lightning attention, RMSNorm in few passes, who multiplies.

Run ``python benchmarks/cpu_kernels.py``: two minutes, leave the machine alone. README.md says how to read it.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_m1.kernels.lightning import layer_slopes
from megatron_m1.kernels.lightning.call import Call
from megatron_m1.kernels.lightning.chunk import CHUNK_SIZE, chunk_lightning_attention
from megatron_m1.kernels.matmul.naive import naive_matmul
from megatron_m1.kernels.matmul.onednn import onednn_matmul, onednn_serves
from megatron_m1.kernels.rmsnorm import rms_norm

RESULT = Path(__file__).resolve().parent / "results" / "cpu_kernels.json"
ROUNDS = 9
SHORTEST = 0.05
"""Seconds of a timing at least: a call is repeated until it takes that long."""
RELATIVE = 1e-4
"""Of the largest number: the 8,192 roundings, 2^-24 each, of the longest sum spread to 5e-6; one result has several."""
HEADS = 8
HEAD_DIMS, CHUNKS = (64, 128), (32, 64, 128, 256)
PACKS = {
    "1 document of 1,024 tokens": (1024,),
    "1 document of 8,192 tokens": (8192,),
    "7 documents of 290 or 293 tokens": (293,) * 6 + (290,),
    "98 documents of 21 or 11 tokens": (21,) * 97 + (11,),
}
ROWS, WIDTH = 2048, 512
PRODUCTS = {
    "a projection": (2048, 512, 2048),
    "a head": (2048, 512, 8192),
    "an expert": (515, 512, 2048),
    "an expert's gradient": (2048, 515, 512),
    "128 cubed": (128, 128, 128),
    "64 cubed": (64, 64, 64),
}

Sides = Mapping[str, Callable[[], object]]


def take_turns(sides: Sides, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Median seconds of each side, which run one after the other in every round; by default of processor time."""
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, side in sides.items():
        side()
        began = clock()
        side()
        repeats[name] = max(1, round(SHORTEST / max(clock() - began, 1e-7)))
    for _ in range(ROUNDS):
        for name, side in sides.items():
            began = clock()
            for _ in range(repeats[name]):
                side()
            times[name].append((clock() - began) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def require_close(what: str, results: Mapping[str, list[Tensor]]) -> None:
    """Compare all sides' results with the first's.

    Raises:
        ValueError: they differ by more than float32 rounds.
    """
    first, *others = results.items()
    for name, values in others:
        for value, wanted in zip(values, first[1], strict=True):
            error = float((value - wanted).abs().max() / wanted.abs().max())
            if not error <= RELATIVE:
                raise ValueError(f"refusing to time {what}: {name} differs from {first[0]} by {error:.1e}")


def lightning(head_dim: int, lengths: tuple[int, ...], chunk_size: int) -> Callable[[], list[Tensor]]:
    """Forward and backward of a pack; returns the output and the gradients of q, k, v."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths), HEADS, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(3))
    grad = torch.randn(shape, generator=generator)
    bounds = (0, *itertools.accumulate(lengths))
    slopes = layer_slopes(HEADS, layer_index=1, num_layers=8)

    def run() -> list[Tensor]:
        output, _ = chunk_lightning_attention(Call(q, k, v, slopes, bounds), chunk_size)
        return [output.detach(), *torch.autograd.grad(output, (q, k, v), grad)]

    return run


def chunk_sizes(threads: int) -> list[dict[str, Any]]:
    """Microseconds a token by head dim, pack and chunk size: processor time, or elapsed time of several threads."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    rows = []
    for dim in HEAD_DIMS:
        for name, lengths in PACKS.items():
            sides = {str(size): lightning(dim, lengths, size) for size in CHUNKS}
            require_close(f"lightning attention, {name}", {size: side() for size, side in sides.items()})
            micro = {size: seconds * 1e6 / sum(lengths) for size, seconds in take_turns(sides, clock).items()}
            rows.append({"threads": threads, "head_dim": dim, "pack": name, "us_per_token": micro})
            best = micro[str(CHUNK_SIZE)]
            cells = "  ".join(f"{size}: {value / best:.2f}" for size, value in micro.items())
            print(f"D {dim}, {name}, threads {threads}: {best:.1f} us a token, times that by chunk size  {cells}")
    return rows


def norms() -> dict[str, dict[str, float]]:
    """Milliseconds of RMSNorm [ROWS, WIDTH], ours and torch's, forward alone and with backward."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    x.requires_grad_()
    weight = torch.randn(WIDTH, generator=generator).requires_grad_()
    forms: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: torch.nn.functional.rms_norm(x, (WIDTH,), weight, 1e-6),
        "ours": lambda: rms_norm(x, weight, 1e-6),
    }

    def both(form: Callable[[], Tensor]) -> list[Tensor]:
        y = form()
        return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]

    with_backward = {name: partial(both, form) for name, form in forms.items()}
    require_close("RMSNorm", {name: run() for name, run in with_backward.items()})
    found = {"forward": take_turns(forms), "forward and backward": take_turns(with_backward)}
    for what, times in found.items():
        print(f"RMSNorm [{ROWS}, {WIDTH}], {what}: torch {times['torch'] / times['ours']:.2f} times as long as ours")
    return {what: {name: seconds * 1e3 for name, seconds in times.items()} for what, times in found.items()}


def products() -> list[dict[str, Any]]:
    """GFLOP/s of float32 products by MKL (or what torch was built with) and by oneDNN."""
    rows = []
    for name, (m, k, n) in PRODUCTS.items():
        a, b = torch.randn(m, k), torch.randn(k, n)
        sides = {"torch": partial(naive_matmul, a, b), "onednn": partial(onednn_matmul, a, b)}
        require_close(f"products of {name}", {side: [call()] for side, call in sides.items()})
        rate = {side: 2e-9 * m * k * n / seconds for side, seconds in take_turns(sides).items()}
        taken = "onednn" if onednn_serves(a, b) else "torch"
        rows.append({"what": name, "m": m, "k": k, "n": n, "gflops": rate, "taken": taken})
        print(f"{name}, {m} x {k} x {n}: oneDNN {rate['onednn'] / rate['torch']:.2f} times as fast; {taken} is taken")
    return rows


def main() -> None:
    """Check, time, print and write."""
    # What has several threads comes last: they would go on waiting for work, in processor time.
    torch.set_num_threads(1)
    alone = {
        "lightning_chunk_sizes": chunk_sizes(1),
        "rms_norm_ms": norms(),
        "float32_products": products(),
    }
    alone["lightning_chunk_sizes"] += chunk_sizes(2)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {"torch": version("torch"), "python": platform.python_version()},
        **alone,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
