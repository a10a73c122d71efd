"""Lightning attention on one GPU: correctness, then time, against FLA's chunk_simple_gla and torch's flash attention.

    python benchmarks/lightning.py [--tokens 2048 8192 32768 131072] [--output benchmarks/results]

Everything in one call. The compiled kernels are compared with float64 first, by the tests' own rule and as they are
timed, and nothing is timed if one is wrong. Shares are of the ceilings that this run measures (a large copy, a large
bfloat16 product), not of a data sheet. Where there is no GPU it says so and ends with status 0. README.md says how to
read it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, silu

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks.common

from benchmarks.common.kernel_check import check_kernels, check_timed  # noqa: E402
from megatron_m1.kernels.lightning import layer_slopes, lightning_attention, silu_lightning_attention  # noqa: E402

HEADS, WIDTH = 64, 128
CHECKED_LENGTHS = [1, 63, 700, 65, 1, 1171]
CHECKED_HEADS = 8
ERROR_TOKENS = 4096
AIM_TOKENS = 32768
NAMES = ("o", "dq", "dk", "dv")
NAMES_OF_PARTS = ("o", "d_parts")


@dataclass(frozen=True)
class Pack:
    """Documents of some lengths, in the forms in which the ops take them."""

    lengths: list[int]

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(self.lengths)

    @property
    def bounds(self) -> list[int]:
        """[N + 1], from 0."""
        return [0, *itertools.accumulate(self.lengths)]


@dataclass(frozen=True)
class Call:
    """What an op is given beside its leaves: prepared once, so that no op pays for another's form."""

    pack: Pack
    slopes: Tensor
    """[H] float32."""
    gamma: Tensor
    """-slopes."""
    cu_seqlens: Tensor
    """[N + 1] int64 on the GPU."""
    cu_seqlens_short: Tensor
    """The same in int32."""

    @classmethod
    def of(cls, pack: Pack, slopes: Tensor) -> Call:
        """Prepare a call."""
        bounds = torch.tensor(pack.bounds, device=slopes.device)
        return cls(pack, slopes, -slopes, bounds, bounds.int())


Op = Callable[[list[Tensor], Call], Tensor]
"""Leaves (q, k, v [T, H, D], or all three in one tensor [T, H, 3, D]) and the call -> o [T, H, D]."""


def ours(leaves: list[Tensor], call: Call) -> Tensor:
    """The Triton kernels."""
    q, k, v = leaves
    return lightning_attention(q, k, v, call.slopes, cu_seqlens=call.pack.bounds, backend="triton")


def ours_silu(leaves: list[Tensor], call: Call) -> Tensor:
    """The Triton kernels with SiLU on load, out of and into one tensor."""
    o, _ = silu_lightning_attention(leaves[0], call.slopes, cu_seqlens=call.pack.bounds, backend="triton")
    return o


def ours_after_silu(leaves: list[Tensor], call: Call) -> Tensor:
    """torch's SiLU of the one tensor, then the Triton kernels on views of its result."""
    return ours(list(silu(leaves[0]).unbind(2)), call)


def fla(leaves: list[Tensor], call: Call) -> Tensor:
    """flash-linear-attention's kernels for a fixed decay per head."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (x.unsqueeze(0) for x in leaves)  # [1, T, H, D]
    cu_seqlens = call.cu_seqlens if len(call.pack.lengths) > 1 else None
    o, _ = chunk_simple_gla(q, k, v, g_gamma=call.gamma, scale=1.0, cu_seqlens=cu_seqlens)
    return o.squeeze(0)


def flash(leaves: list[Tensor], call: Call) -> Tensor:
    """torch's causal flash attention: another function, for the time."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        if len(call.pack.lengths) == 1:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in leaves)  # [1, H, T, D]
            return scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(0).transpose(0, 1)
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = call.cu_seqlens_short, max(call.pack.lengths)
        o = varlen_attn(*leaves, bounds, bounds, longest, longest, window_size=(-1, 0))
        assert isinstance(o, Tensor)
        return o


def exact_lightning(leaves: list[Tensor], call: Call) -> Tensor:
    """The torch form, for float64 inputs: the truth of ``ours`` and ``fla``."""
    q, k, v = leaves
    return lightning_attention(q, k, v, call.slopes, cu_seqlens=call.pack.bounds, backend="chunk")


def exact_softmax(leaves: list[Tensor], call: Call) -> Tensor:
    """Softmax attention document by document, for float64 inputs: the truth of ``flash``."""
    outputs = []
    for document in zip(*(x.split(call.pack.lengths) for x in leaves), strict=True):
        q, k, v = (x.transpose(0, 1) for x in document)  # [H, n, D]
        later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.mT / WIDTH**0.5).masked_fill(later, float("-inf"))
        outputs.append((scores.softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def exact_silu(leaves: list[Tensor], call: Call) -> Tensor:
    """The same after SiLU, for float64 inputs: the truth of ``ours_silu`` and ``ours_after_silu``."""
    return exact_lightning(list(silu(leaves[0]).unbind(2)), call)


OPS: dict[str, Op] = {"ours": ours, "ours silu": ours_silu, "silu, ours": ours_after_silu, "flash": flash, "fla": fla}
"""Ours first: an implementation that takes the GPU's context down with it costs no row of ours."""
TRUTHS: dict[str, Op] = {
    "ours": exact_lightning,
    "ours silu": exact_silu,
    "silu, ours": exact_silu,
    "flash": exact_softmax,
    "fla": exact_lightning,
}
THEIRS = ("flash", "fla")


def pack_size(text: str) -> int:
    """Of ``--tokens``: for much fewer, documents of at most half of them would be drawn without end."""
    if int(text) < 256:
        raise argparse.ArgumentTypeError(f"a pack of {text} tokens is too small: give at least 256")
    return int(text)


def make_pack(tokens: int, packed: bool) -> Pack:
    """One document, or documents of log-normal length, median 1,200 tokens and sigma 1.2, cut to fill the pack.

    A document of more than half the pack is drawn again, so that a pack has two at least.
    """
    if not packed:
        return Pack([tokens])
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        length = int(torch.exp(7.1 + 1.2 * torch.randn((), generator=generator)))
        if length <= tokens // 2:
            lengths.append(max(1, min(length, tokens - sum(lengths))))
    return Pack(lengths)


def make_inputs(name: str, tokens: int, slopes: Tensor) -> tuple[list[Tensor], Tensor]:
    """Leaves of the op called ``name`` and the gradient of its output, bfloat16."""
    generator = torch.Generator(slopes.device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=slopes.device, dtype=torch.bfloat16)

    heads = slopes.numel()
    leaves = [normal(tokens, heads, 3, WIDTH)] if "silu" in name else [normal(tokens, heads, WIDTH) for _ in range(3)]
    return leaves, normal(tokens, heads, WIDTH)


def outcome(op: Op, leaves: list[Tensor], grad: Tensor, call: Call) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    o = op(leaves, call)
    return [o.detach(), *torch.autograd.grad(o, leaves, grad.to(o.dtype))]


def errors(name: str, slopes: Tensor, packed: bool) -> dict[str, float]:
    """Relative errors of an op, on all heads at once, against its own truth in float64, on a few at a time."""
    pack = make_pack(ERROR_TOKENS, packed)
    leaves, grad = make_inputs(name, ERROR_TOKENS, slopes)
    actual = outcome(OPS[name], leaves, grad, Call.of(pack, slopes))
    off = torch.zeros(len(actual), dtype=torch.float64, device=slopes.device)
    size = torch.zeros_like(off)
    for first in range(0, slopes.numel(), CHECKED_HEADS):
        some = slice(first, first + CHECKED_HEADS)
        inputs = [x[:, some].double() for x in leaves]
        truth = outcome(TRUTHS[name], inputs, grad[:, some].double(), Call.of(pack, slopes[some]))
        off += torch.stack([(a[:, some].double() - t).square().sum() for a, t in zip(actual, truth, strict=True)])
        size += torch.stack([t.square().sum() for t in truth])
    names = NAMES_OF_PARTS if len(actual) == len(NAMES_OF_PARTS) else NAMES
    return dict(zip(names, (off / size).sqrt().tolist(), strict=True))


def milliseconds(run: Callable[[], object]) -> float:
    """Median over 0.2 s, with a cold L2."""
    return float(triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median"))


def ceilings() -> dict[str, float]:
    """TB/s of a copy of 2 GiB (read and written), TFLOP/s of a bfloat16 product of 8192^3."""
    source = torch.zeros(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = milliseconds(lambda: a @ b)
    return {"tb_per_s": 2 * source.nbytes / copy / 1e9, "tflop_per_s": 2 * 8192**3 / product / 1e9}


def needed_flops(name: str, pack: Pack) -> tuple[float, float]:
    """Of forward, and of forward and backward: a state's update and use per token, or half of all pairs of tokens."""
    if name == "flash":
        forward = 2.0 * sum(n * n for n in pack.lengths) * HEADS * WIDTH
        return forward, 3.5 * forward
    forward = 4.0 * pack.tokens * HEADS * WIDTH**2
    return forward, 3 * forward


def measure(name: str, pack: Pack, slopes: Tensor, top: dict[str, float]) -> dict[str, Any]:
    """Milliseconds, peak memory, and what must move and be multiplied a second, also as shares of the ceilings.

    What must move: q, k, v, o; in backward q, k, v, do, dq, dk, dv.
    """
    op, call = OPS[name], Call.of(pack, slopes)
    leaves, grad = make_inputs(name, pack.tokens, slopes)
    outcome(op, leaves, grad, call)  # compiles, and measures configurations
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outcome(op, leaves, grad, call)
    row = {"peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30}

    def forward() -> None:
        with torch.no_grad():
            op(leaves, call)

    times = {"forward": milliseconds(forward), "both": milliseconds(lambda: outcome(op, leaves, grad, call))}
    flops = dict(zip(times, needed_flops(name, pack), strict=True))
    for kind, tensors in (("forward", 4), ("both", 11)):
        row[f"{kind}_ms"] = times[kind]
        row[f"{kind}_tb_per_s"] = tensors * grad.nbytes / times[kind] / 1e9
        row[f"{kind}_tflop_per_s"] = flops[kind] / times[kind] / 1e9
        row[f"{kind}_share_of_copy"] = row[f"{kind}_tb_per_s"] / top["tb_per_s"]
        row[f"{kind}_share_of_product"] = row[f"{kind}_tflop_per_s"] / top["tflop_per_s"]
    return row


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run`` returns, or why it did not: one failure costs no other row."""
    try:
        result = run()
        torch.cuda.empty_cache()
        return result
    except Exception as error:
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        torch.cuda.empty_cache()
    except Exception as error:  # a lost context: so will the rest fail, and be named
        fault += f"; then {type(error).__name__}"
    return {"failed": fault}


def measure_all(
    tokens: list[int], names: list[str], slopes: Tensor, record: dict[str, Any], save: Callable[[], None]
) -> None:
    """Record errors and, for each length, a row of each op, dense and packed; ``save`` after each op."""
    print(
        f"{'tokens':>7} {'docs':>5} {'op':<10}  forward: ms TB/s TFLOP/s, forward and backward: the same; shares; GiB"
    )
    for name in names:
        for kind, packed in (("dense", False), ("packed", True)):
            found = attempt(functools.partial(errors, name, slopes, packed))
            record["errors"][f"{name} {kind}"] = found
            print(f"error of {name} {kind}: {json.dumps(found)}", flush=True)
        for length, packed in itertools.product(tokens, (False, True)):
            pack = make_pack(length, packed)
            row: dict[str, Any] = {"op": name, "tokens": length, "documents": len(pack.lengths)}
            row |= attempt(functools.partial(measure, name, pack, slopes, record["ceilings"]))
            record["rows"].append(row)
            print(line(row), flush=True)
        record["aims"] = aims(record["rows"], record["errors"])
        save()


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    if "failed" in row:
        return f"{row['tokens']:>7} {row['documents']:>5} {row['op']:<10}  {row['failed']}"
    text = f"{row['tokens']:>7} {row['documents']:>5} {row['op']:<10} "
    for kind in ("forward", "both"):
        text += f" {row[f'{kind}_ms']:8.3f} {row[f'{kind}_tb_per_s']:5.2f} {row[f'{kind}_tflop_per_s']:6.1f}"
        text += f" ({row[f'{kind}_share_of_copy']:4.0%} {row[f'{kind}_share_of_product']:4.0%})"
    return f"{text} {row['peak_gib']:6.2f}"


def aims(rows: list[dict[str, Any]], found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What is aimed at for 32,768 tokens, as it was measured; README.md has the aims."""
    at = {(row["op"], row["documents"] > 1): row for row in rows if row["tokens"] == AIM_TOKENS and "both_ms" in row}
    result: dict[str, float] = {}
    if ("ours", False) in at:
        mine = at["ours", False]
        result |= {"forward_ms": mine["forward_ms"], "both_ms": mine["both_ms"]}
        if ("ours", True) in at:
            for kind in ("forward", "both"):
                result[f"packed_over_dense_{kind}"] = at["ours", True][f"{kind}_ms"] / mine[f"{kind}_ms"]
        if ("fla", False) in at:
            result["fla_over_ours_forward"] = at["fla", False]["forward_ms"] / mine["forward_ms"]
            result["fla_over_ours_both"] = at["fla", False]["both_ms"] / mine["both_ms"]
    own, theirs = found.get("ours dense", {}), found.get("fla dense", {})
    if "o" in own and "o" in theirs:
        result["error_over_fla"] = max(own[name] / theirs[name] for name in NAMES)
    return result


def versions(names: list[str]) -> dict[str, str | None]:
    """Of what was measured."""
    found: dict[str, str | None] = {"torch": torch.__version__, "triton": triton.__version__}
    found["cuda"] = torch.version.cuda
    if "fla" in names:
        # Its kernels come in a distribution of another name by themselves, or from a folder on the path.
        owners = packages_distributions().get("fla", [])
        found["fla"] = ", ".join(f"{owner} {version(owner)}" for owner in sorted(set(owners))) or "unknown"
    return found


def main() -> None:
    """Check, time, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=pack_size, nargs="+", default=[2048, 8192, AIM_TOKENS, 131072])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("lightning: no GPU here, nothing measured")
        return
    if triton.knobs.runtime.interpret:
        sys.exit("lightning: TRITON_INTERPRET is set, so that kernels would run on the CPU: unset it")
    names = list(OPS)
    if importlib.util.find_spec("fla") is None:
        names.remove("fla")
        print("flash-linear-attention is not installed: no comparison with it (pip install flash-linear-attention)")
    made_with, slopes = versions(names), layer_slopes(HEADS, 39, 80).cuda()
    shares = check_kernels(torch.device("cuda"), CHECKED_LENGTHS, CHECKED_HEADS, WIDTH)
    shares |= check_timed(slopes, CHECKED_LENGTHS, WIDTH)
    wrong = {name: share for name, share in shares.items() if not share <= 1.0}
    if wrong:
        sys.exit(f"not timed, since the kernels are wrong; error as a share of what is allowed: {wrong}")
    print(f"correct: {len(shares)} results, the worst has {max(shares.values()):.2f} of the error that is allowed")
    top = ceilings()
    print(json.dumps({"ceilings": top}))
    now, gpu = datetime.now(UTC), torch.cuda.get_device_name()
    record: dict[str, Any] = {"gpu": gpu, "date": now.isoformat(), "versions": made_with, "ceilings": top}
    record |= {"shares_of_allowed_error": shares, "errors": {}, "rows": [], "aims": {}}
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"lightning_{gpu.replace(' ', '-')}_{now:%Y%m%dT%H%M%S}.json"
    measure_all(arguments.tokens, names, slopes, record, lambda: write(path, record))
    print(json.dumps(record["aims"], indent=1))
    print(f"written to {path}")
    own = [row for row in record["rows"] if row["op"] not in THEIRS]
    own += [error for what, error in record["errors"].items() if not what.startswith(THEIRS)]
    if any("failed" in found for found in own):
        sys.exit("some rows or errors of ours failed: see above")


def write(path: Path, record: dict[str, Any]) -> None:
    """Replace what was written of the same run."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
