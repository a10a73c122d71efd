"""Memory and speed of conversion, both ways, against ``cp`` and ``fsync`` of the same bytes.

Run ``python benchmarks/convert.py``: three minutes and 10 GB of disk. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks.common

from benchmarks.common.memory import PeakMemory  # noqa: E402
from megatron_m1.checkpoint.folder import read_manifest  # noqa: E402
from megatron_m1.cli import run  # noqa: E402
from megatron_m1.config import ModelConfig  # noqa: E402
from megatron_m1.convert.families.minimax_m1.config import hub_config  # noqa: E402
from megatron_m1.convert.families.minimax_m1.weights import units  # noqa: E402
from megatron_m1.convert.hub_folder import open_hub_folder  # noqa: E402
from megatron_m1.convert.load_hf import CHECKPOINT, LoadOptions, load_hf  # noqa: E402
from megatron_m1.convert.places import INDEX  # noqa: E402
from megatron_m1.convert.safetensors_files import Entry, StreamedFile  # noqa: E402
from megatron_m1.convert.work import Ranks  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
MODEL = ModelConfig(
    num_layers=16,
    hidden_size=1024,
    num_attention_heads=16,
    kv_channels=64,
    num_query_groups=2,
    moe_ffn_hidden_size=2048,
    num_moe_experts=8,
    vocab_size=65_536,
)
"""1.0B parameters in M1's proportions: 2 GB in bf16."""
WARM_UP = ModelConfig(
    num_layers=8,
    hidden_size=64,
    num_attention_heads=4,
    kv_channels=16,
    num_query_groups=2,
    moe_ffn_hidden_size=32,
    num_moe_experts=2,
    vocab_size=128,
)
ROUNDS = 5
MEMORY_LIMIT = 600 * 10**6
SPEED_LIMIT = 0.5


def write_model(folder: Path, model: ModelConfig) -> int:
    """Write a random bf16 model as a hub folder of eight files; returns the bytes of its weights."""
    folder.mkdir()
    every = units(model)
    shards = [every[start::8] for start in range(8)]
    weights, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    for number, shard in enumerate(shards):
        entries = [Entry(p.name, unit.dtype(torch.bfloat16), p.shape) for unit in shard for p in unit.parts]
        name = f"model-{number + 1:05}-of-00008.safetensors"
        with StreamedFile(folder / name, entries) as file:
            for entry in entries:
                file.add(torch.randn(entry.shape, generator=generator).to(entry.dtype))
        weights |= {entry.name: name for entry in entries}
        total += sum(entry.size for entry in entries)
    (folder / "config.json").write_text(json.dumps(hub_config(model, torch.bfloat16, 4096)))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weights}))
    return total


def measure_alone(direction: str, source: Path, out: Path) -> dict[str, float]:
    """Seconds and peak memory of the command with its defaults, in this process, which has done nothing else.

    A tiny model is converted both ways before.
    """
    with tempfile.TemporaryDirectory() as folder:
        # What is imported and compiled once belongs to the interpreter.
        root = Path(folder)
        write_model(root / "hub", WARM_UP)
        run(["convert", "from-hf", str(root / "hub"), str(root / "ours")])
        run(["convert", "to-hf", str(root / "ours"), str(root / "again")])
    with PeakMemory() as memory:
        began = time.perf_counter()
        if run(["convert", direction, str(source), str(out)]) != 0:
            raise RuntimeError(f"{direction} failed")
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory": memory.extra}


def in_own_process(direction: str, source: Path, out: Path) -> dict[str, float]:
    """``measure_alone`` in a fresh interpreter."""
    command = [sys.executable, __file__, "--alone", direction, str(source), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def copy(source: Path, out: Path) -> dict[str, float]:
    """``cp -r`` of a folder and fsync of every file."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for path in out.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"seconds": time.perf_counter() - began, "memory": 0.0}


def require_same_bytes(hub: Path, again: Path) -> None:
    """Compare two hub folders, tensor by tensor.

    Raises:
        ValueError: they differ.
    """
    first, second = open_hub_folder(hub), open_hub_folder(again)
    for unit in first.units:
        if not torch.equal(first.read(unit).view(torch.uint8), second.read(unit).view(torch.uint8)):
            raise ValueError(f"refusing to report: {unit.ours} did not come back")


def require_same_files(ours: Path, again: Path) -> None:
    """Compare the files of two checkpoints that hold weights, by their SHA-256.

    Raises:
        ValueError: they differ.
    """
    first, second = (
        {name: digest for name, digest in read_manifest(folder).items() if name.endswith(".distcp")}
        for folder in (ours, again)
    )
    if not first or first != second:
        raise ValueError(f"refusing to report: {sorted(first)} and {sorted(second)} differ")


def take_turns(root: Path, hub: Path) -> dict[str, list[dict[str, float]]]:
    """All sides once a round, after one uncounted round; what they wrote is removed."""
    ours = root / "ours"
    load_hf(open_hub_folder(hub), ours, LoadOptions(), Ranks())
    out = root / "out"
    sides: dict[str, Callable[[], dict[str, float]]] = {
        "cp, hub": lambda: copy(hub, out),
        "from-hf": lambda: in_own_process("from-hf", hub, out),
        "cp, ours": lambda: copy(ours, out),
        "to-hf": lambda: in_own_process("to-hf", ours / CHECKPOINT, out),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(-1, ROUNDS):
        for name, side in sides.items():
            result = side()
            if turn >= 0:
                found[name].append(result)
            if turn == ROUNDS - 1 and name == "from-hf":
                require_same_files(ours / CHECKPOINT, out / CHECKPOINT)
            if turn == ROUNDS - 1 and name == "to-hf":
                require_same_bytes(hub, out)
            shutil.rmtree(out)
    return found


def report(found: dict[str, list[dict[str, float]]], size: int) -> dict[str, Any]:
    """Print and return every side's fastest round and most memory, and say whether both limits are kept."""
    # Everything that disturbs a round, on a side that runs alone, makes it longer.
    seconds = {name: min(r["seconds"] for r in results) for name, results in found.items()}
    memory = {name: max(r["memory"] for r in results) for name, results in found.items()}
    lines: dict[str, Any] = {}
    for direction, other in (("from-hf", "cp, hub"), ("to-hf", "cp, ours")):
        ratio = seconds[other] / seconds[direction]
        lines[direction] = {
            "speed_of_cp": ratio,
            "memory_mb": memory[direction] / 1e6,
            "kept": ratio >= SPEED_LIMIT and memory[direction] < MEMORY_LIMIT,
        }
        print(
            f"{direction}: {size / 1e9:.2f} GB, {ratio:.2f} of the speed of cp and fsync (at least {SPEED_LIMIT}), "
            f"{memory[direction] / 1e6:.0f} MB of anonymous memory at most (below {MEMORY_LIMIT / 1e6:.0f})"
        )
    return lines


def main() -> int:
    """Run everything; status 1 when a limit is not kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--alone", nargs=3, metavar=("DIRECTION", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary one)")
    options = parser.parse_args()
    if options.alone is not None:
        print(json.dumps(measure_alone(options.alone[0], Path(options.alone[1]), Path(options.alone[2]))))
        return 0
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        size = write_model(root / "hub", MODEL)
        found = take_turns(root, root / "hub")
    lines = report(found, size)
    RESULTS.mkdir(exist_ok=True)
    now = datetime.now(UTC)
    content = {
        "when": now.isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "safetensors")},
        "bytes": size,
        "result": lines,
        "all": found,
    }
    (RESULTS / "convert.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0 if all(line["kept"] for line in lines.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
