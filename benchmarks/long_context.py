"""How long a pack the tiny model trains on two CPU processes, and what a token costs in memory.

Packs of 16K to 256K tokens, more than half of each one document, context parallelism over 2 ranks, full recomputation,
fp32. Run ``python benchmarks/long_context.py``; it takes the whole machine (2 cores, 24 GB) for many minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RANKS = 2
LENGTHS = (2**14, 2**15, 2**16, 2**17, 2**18)
LIMIT = 24 * 10**9
"""Bytes of both processes together."""
HEAD_CHUNK_MIB = 16.0
# glibc's heap keeps freed blocks of up to 32 MiB: with them, what short packs hold would not be what they need.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
MARK = "measured: "


def document_bounds(tokens: int) -> list[int]:
    """Short documents, one of more than half the pack, and one more."""
    short = list(range(0, tokens // 8, 900))
    return [*short, tokens // 8, tokens // 8 + tokens // 2 + 901, tokens]


def peak_bytes() -> int:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(tokens: int) -> None:
    """Two steps on this rank; rank 0 prints what all ranks held."""
    # Imported here: the process that only starts the others needs none of it.
    from torch import distributed as dist

    from megatron_m1.config import Config
    from megatron_m1.config.presets import preset
    from megatron_m1.config.resolve import resolve
    from megatron_m1.data.packed import PackedSample
    from megatron_m1.runtime import mesh
    from megatron_m1.training.step import train_step
    from megatron_m1.training.trained_model import build_trained_model

    torch.set_num_threads(1)
    config = Config()
    config.model = preset("tiny")
    # The head's chunk is a fixed cost up to its budget; the default's would hide what a token costs.
    config.model.lm_head_chunk_mib = HEAD_CHUNK_MIB
    config.data.seq_length = tokens
    config.parallel.context_parallel_size = RANKS
    config.parallel.distributed_timeout_seconds = 3600.0
    config.train.global_batch_size = 1
    config.train.recompute_granularity = "full"
    config = resolve(config, RANKS, has_gpu=False)
    trained = build_trained_model(config, mesh.initialise(config.parallel, seed=config.train.seed))
    before = peak_bytes()
    bounds = document_bounds(tokens)
    text = torch.randint(0, config.model.vocab_size, (tokens + 1,), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(tokens)
    mask[torch.tensor(bounds[1:]) - 1] = 0.0
    sample = PackedSample(text[:-1], text[1:], mask, torch.tensor(bounds, dtype=torch.int32))
    losses = [train_step(trained, [sample], lr=1e-3).loss for _ in range(2)]
    held: list[Any] = [None] * RANKS
    dist.all_gather_object(held, (before, peak_bytes()))
    if trained.mesh.rank == 0:
        longest = max(end - start for start, end in itertools.pairwise(bounds))
        record = {"tokens": tokens, "longest_document": longest, "losses": losses, "bytes_before_and_peak": held}
        print(MARK + json.dumps(record), flush=True)
    mesh.shut_down()


def run(tokens: int) -> dict[str, Any]:
    """Train in fresh processes, since a process's peak never falls."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    result = subprocess.run(
        [*command, __file__, "--tokens", str(tokens)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith(MARK)]
    if result.returncode or not lines:
        raise SystemExit(f"{tokens} tokens failed with status {result.returncode}:\n{result.stderr[-3000:]}")
    record: dict[str, Any] = json.loads(lines[0].removeprefix(MARK))
    growth = [peak - before for before, peak in record["bytes_before_and_peak"]]
    record["growth_of_a_rank"] = max(growth)
    record["bytes_per_token_and_rank"] = max(growth) / (tokens / RANKS)
    record["peak_of_all_ranks"] = sum(peak for _, peak in record["bytes_before_and_peak"])
    return record


def fit(records: list[dict[str, Any]]) -> tuple[float, float]:
    """Bytes of a token and fixed bytes of a rank: the straight line through all lengths, by least squares."""
    slope, fixed = np.polyfit([r["tokens"] / RANKS for r in records], [r["growth_of_a_rank"] for r in records], 1)
    return float(slope), float(fixed)


def plot(records: list[dict[str, Any]], slope: float, fixed: float) -> None:
    """Growth of a rank's memory against its tokens."""
    local = [record["tokens"] / RANKS for record in records]
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.plot(local, [record["growth_of_a_rank"] / 2**30 for record in records], "o", label="measured")
    line = [(slope * n + fixed) / 2**30 for n in local]
    axis.plot(local, line, "--", label=f"{slope / 1000:.1f} KB a token + {fixed / 1e6:.0f} MB")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens of a rank")
    axis.set_ylabel("GiB above the model and its optimizer")
    axis.set_title("tiny on 2 processes: peak memory of a rank in a training step")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "long_context.png", dpi=110)


def main() -> None:
    """Run all lengths, check the claims, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, help="train one length in this process, as the script does itself")
    tokens = parser.parse_args().tokens
    if tokens is not None:
        train(tokens)
        return
    test = "tests/model/test_context_parallel.py"
    subprocess.run([sys.executable, "-m", "pytest", "-q", test], cwd=ROOT, check=True)
    records = []
    for length in LENGTHS:
        records.append(run(length))
        print(json.dumps(records[-1]), flush=True)
    slope, fixed = fit(records)
    RESULTS.mkdir(exist_ok=True)
    result = {"date": date.today().isoformat(), "torch": torch.__version__, "bytes_per_token": slope, "fixed": fixed}
    (RESULTS / "long_context.json").write_text(json.dumps(result | {"runs": records}, indent=1) + "\n")
    plot(records, slope, fixed)
    print(f"{slope / 1000:.1f} KB per token and rank, and {fixed / 1e6:.0f} MB")
    assert records[-1]["longest_document"] >= 131_072
    assert records[-1]["peak_of_all_ranks"] <= LIMIT, records[-1]
    for record in records:
        expected = slope * record["tokens"] / RANKS + fixed
        assert abs(record["growth_of_a_rank"] / expected - 1) < 0.15, f"not linear in the tokens: {record}, {expected}"


if __name__ == "__main__":
    main()
