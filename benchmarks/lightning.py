"""Lightning attention on one GPU: correctness, then time, against FLA's chunk_simple_gla and torch's flash attention.

    python benchmarks/lightning.py [--tokens 2048 8192 32768 131072] [--output benchmarks/results]

Everything in one call: it compares with float64 first and times nothing that is wrong. Shares are of the ceilings that
this run measures (a large copy, a large bfloat16 matrix product), not of a data sheet.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_m1.kernels.lightning import layer_slopes, lightning_attention

HEADS, WIDTH = 64, 128
NAMES = ("o", "dq", "dk", "dv")
Op = Callable[[Tensor, Tensor, Tensor, Tensor, list[int]], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: list[int]) -> Tensor:
    """The Triton kernels."""
    return lightning_attention(q, k, v, slopes, cu_seqlens=bounds, backend="triton")


def fla(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: list[int]) -> Tensor:
    """flash-linear-attention's kernel for a fixed decay per head."""
    from fla.ops.simple_gla import chunk_simple_gla

    cu_seqlens = torch.tensor(bounds, device=q.device)
    tensors = (x.unsqueeze(0) for x in (q, k, v))  # [1, T, H, D]
    o, _ = chunk_simple_gla(*tensors, g_gamma=-slopes, scale=1.0, cu_seqlens=cu_seqlens)
    return o.squeeze(0)


def flash(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: list[int]) -> Tensor:
    """torch's causal flash attention over the whole pack (another function: for the time alone)."""
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, T, D]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)


def lengths(tokens: int, packed: bool) -> list[int]:
    """One document, or documents of log-normal length, median 1,200 tokens and sigma 1.2, cut to fill the pack."""
    if not packed:
        return [tokens]
    generator = torch.Generator().manual_seed(0)
    documents: list[int] = []
    while sum(documents) < tokens:
        length = int(torch.exp(7.1 + 1.2 * torch.randn((), generator=generator)))
        documents.append(max(1, min(length, tokens - sum(documents))))
    return documents


def inputs(tokens: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient, [T, H, D]."""
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (tokens, heads, WIDTH)
    return [torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype) for _ in range(4)]


def outcome(op: Op, tensors: list[Tensor], slopes: Tensor, bounds: list[int]) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    o = op(*leaves, slopes, bounds)
    return [o.detach(), *torch.autograd.grad(o, leaves, tensors[3].to(o.dtype))]


def chunked(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: list[int]) -> Tensor:
    """The torch form, in float64: the truth."""
    return lightning_attention(q, k, v, slopes, cu_seqlens=bounds, backend="chunk")


def errors(op: Op, slopes: Tensor, bounds: list[int]) -> dict[str, float]:
    """Relative errors against float64."""
    tensors = inputs(bounds[-1], slopes.numel(), torch.bfloat16)
    truth = outcome(chunked, [x.double() for x in tensors], slopes, bounds)
    actual = outcome(op, tensors, slopes, bounds)
    pairs = zip(NAMES, actual, truth, strict=True)
    return {name: float((a.double() - t).norm() / t.norm()) for name, a, t in pairs}


def ceilings() -> dict[str, float]:
    """TB/s of a copy of 2 GiB (read and written), TFLOP/s of a bfloat16 product of 8192^3."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = triton.testing.do_bench(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = triton.testing.do_bench(lambda: a @ a)
    return {"tb_per_s": 2 * source.nbytes / copy / 1e9, "tflop_per_s": 2 * 8192**3 / product / 1e9}


def measure(op: Op, tensors: list[Tensor], slopes: Tensor, bounds: list[int]) -> dict[str, float]:
    """Milliseconds of forward and of forward and backward; GiB at the peak beyond the inputs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outcome(op, tensors, slopes, bounds)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30

    def forward() -> None:
        with torch.no_grad():
            op(*tensors[:3], slopes, bounds)

    def both() -> None:
        outcome(op, tensors, slopes, bounds)

    times = [triton.testing.do_bench(f, warmup=50, rep=200, return_mode="median") for f in (forward, both)]
    return {"forward_ms": times[0], "both_ms": times[1], "peak_gib": peak}


def rates(row: dict[str, Any], tokens: int, top: dict[str, float]) -> dict[str, float]:
    """What must move (q, k, v, o; backward q, k, v, do, dq, dk, dv) and be multiplied, a second."""
    tensor = tokens * HEADS * WIDTH
    result = {}
    for name, tensors, products in (("forward", 4, 4), ("both", 11, 12)):
        seconds = row[f"{name}_ms"] / 1e3
        result[f"{name}_tb_per_s"] = 2 * tensors * tensor / seconds / 1e12
        result[f"{name}_tflop_per_s"] = products * tensor * WIDTH / seconds / 1e12
        result[f"{name}_share_of_copy"] = result[f"{name}_tb_per_s"] / top["tb_per_s"]
        result[f"{name}_share_of_product"] = result[f"{name}_tflop_per_s"] / top["tflop_per_s"]
    return result


def check(ops: dict[str, Op], slopes: Tensor) -> dict[str, dict[str, float]]:
    """Errors of each op on a dense and a packed case; ends the program if ours are not rounding.

    bfloat16 rounds S or the scores before the last product and the result after it, each by at most 2^-9: twice that
    of both is 2^-7.
    """
    found = {}
    for name, op in ops.items():
        if name == "flash":
            continue
        for packed in (False, True):
            bounds = [0, *itertools.accumulate(lengths(4096, packed))]
            found[f"{name} {'packed' if packed else 'dense'}"] = errors(op, slopes[::8].contiguous(), bounds)
    wrong = {name: e for name, e in found.items() if name.startswith("ours") and not max(e.values()) <= 2.0**-7}
    if wrong:
        sys.exit(f"not timed, since the kernels are wrong: {wrong}")
    return found


def main() -> None:
    """Check, time, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("lightning: no GPU here, nothing measured")
        return
    ops: dict[str, Op] = {"ours": ours, "flash": flash}
    if importlib.util.find_spec("fla") is not None:
        ops["fla"] = fla
    else:
        print("flash-linear-attention is not installed: no comparison with it (pip install flash-linear-attention)")
    slopes = layer_slopes(HEADS, 39, 80).cuda()
    found = check(ops, slopes)
    top = ceilings()
    print(json.dumps({"ceilings": top, "errors": found}, indent=1))
    rows = []
    for tokens, packed, (name, op) in itertools.product(arguments.tokens, (False, True), ops.items()):
        if name == "flash" and packed:
            continue
        bounds = [0, *itertools.accumulate(lengths(tokens, packed))]
        row: dict[str, Any] = {"op": name, "tokens": tokens, "documents": len(bounds) - 1}
        row |= measure(op, inputs(tokens, HEADS, torch.bfloat16), slopes, bounds)
        if name != "flash":
            row |= rates(row, tokens, top)
        rows.append(row)
        print(json.dumps({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}), flush=True)
    now = datetime.now(UTC)
    gpu = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    record = {"gpu": gpu, "date": now.isoformat(), "versions": versions, "ceilings": top, "errors": found, "rows": rows}
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"lightning_{gpu.replace(' ', '-')}_{now:%Y%m%d}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1))
    partial.replace(path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
