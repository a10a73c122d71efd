"""What a run's stream of packs costs at scale: opening, planning, resuming; padding and cut documents by packing.

README.md says what is measured. Run ``python benchmarks/data_scale.py``; it takes some minutes and 1.5 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks.common

from benchmarks.common.big_corpora import big_corpus, log_normal  # noqa: E402
from benchmarks.common.memory import PeakMemory  # noqa: E402
from megatron_m1.data.stream import Stream, StreamConfig, best_fit, open_stream  # noqa: E402
from megatron_m1.data.stream.corpus import open_corpus  # noqa: E402
from megatron_m1.files import write_atomically  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SOURCES = 10
MEAN, SIGMA = 1024, 1.5
WEIGHTS = [30, 20, 15, 10, 8, 6, 5, 3, 2, 1]
"""Of sources whose sizes are as 1 to 10: some are seen more than once, some in part."""
LENGTHS = {"8K": 8192, "1M": 1 << 20}
STEP_TOKENS = 1 << 24
"""Of a step: 2,048 packs of 8K, or 16 of 1M."""
STARTS = (0, 10**9, 10**10)
"""Tokens seen before a start that is measured."""
ALL_TOKENS = 7.5e12
DOCUMENTS = 1_000_000
WINDOWS = (64, 256, 1024)


class Facts:
    """Of a tokenizer that is none."""

    vocab_size, eod = 65_536, 1

    def digest(self) -> str:
        """No corpus here names one."""
        return "0" * 64


def open_blend(folder: Path, length: int, packing: Any, state: dict[str, Any] | None) -> Stream:
    """The stream of all sources; their ids, which are not real, are not looked at."""
    return open_stream(
        StreamConfig([str(folder / f"source{n}") for n in range(SOURCES)], length, packing),
        tokenizer=Facts(),
        weights=lambda tokens: WEIGHTS,
        state=state,
        note=print,
    )


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of this process's CPUs and of the clock, and the most memory meanwhile."""
    with PeakMemory() as memory:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_s": cpu, "wall_s": wall, "memory": memory.extra}


def plan_alone(folder: Path, length: int, packing: str, tokens: int) -> dict[str, Any]:
    """Open the blend and plan ``tokens`` of it by steps; states are left in the folder for ``start_alone``."""
    found: list[Stream] = []
    opened = timed(lambda: found.append(open_blend(folder, length, packing, None)))
    stream = found[0]
    marks = [mark for mark in STARTS if mark <= tokens]

    def plan() -> None:
        for seen in range(0, tokens, STEP_TOKENS):
            while marks and seen >= marks[0]:
                path = folder / f"state-{length}-{packing}-{marks.pop(0)}.json"
                path.write_text(json.dumps(stream.state()))
            stream.take(STEP_TOKENS // length, tokens=seen)

    planned = timed(plan)
    counts, state = stream.counts(), len(json.dumps(stream.state()))
    return {
        "open": opened,
        "plan": planned,
        "tokens": counts.packs * length,
        "documents": counts.documents,
        "state": state,
    }


def start_alone(folder: Path, length: int, packing: str, seen: int) -> dict[str, Any]:
    """From a state to the plans of the next step."""
    state = json.loads((folder / f"state-{length}-{packing}-{seen}.json").read_text())

    def start() -> None:
        open_blend(folder, length, packing, state).take(STEP_TOKENS // length, tokens=seen)

    # The first one maps and imports; both are of a process that starts.
    return timed(start)


def index_alone(folder: Path, length: int, _: str, tokens: int) -> dict[str, Any]:
    """``GPTDataset``'s indices of the same blend: built, and opened again as a resumed run does."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_m1.data.packed.dataset import _DatasetTokenizer

    cache = folder / f"gpt-{length}"
    samples = tokens // length
    prefixes = [str(folder / f"source{n}") for n in range(SOURCES)]
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=length,
        blend_per_split=[(prefixes, [weight / 100 for weight in WEIGHTS]), None, None],
        path_to_cache=str(cache),
        tokenizer=_DatasetTokenizer(65_536, 1, ""),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=max(0.005, (SOURCES + 1) / samples),
    )

    def build() -> None:
        BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()

    built, again = timed(build), timed(build)
    return {"build": built, "again": again, "disk": sum(path.stat().st_size for path in cache.rglob("*.npy"))}


def pack_alone(folder: Path, length: int, packing: str, window: int) -> dict[str, Any]:
    """One epoch of a million documents, after which every token must have come once."""
    prefix = str(folder / "million")
    if window:
        best_fit.WINDOW = window
    stream = open_stream(
        StreamConfig([prefix], length, packing, max_epochs={prefix: 1}),  # type: ignore[arg-type]
        tokenizer=Facts(),
        weights=lambda tokens: [1.0],
        state=None,
        note=print,
    )
    lengths = open_corpus(prefix).lengths
    tokens = int(lengths.sum(dtype=np.int64))
    given = np.zeros(len(lengths), np.int64)
    pieces: list[Any] = []

    def pack() -> None:
        left = tokens
        while left:
            (plan,) = stream.take(1, tokens=0)
            left -= plan.tokens
            pieces.append(plan.filling.pieces)

    cost = timed(pack)
    for part in pieces:
        np.add.at(given, part.documents, part.ends - part.starts)
    if not (given == lengths).all():
        raise SystemExit("not every token came once: nothing is printed")
    counts = stream.counts()
    return {
        **cost,
        "packs": counts.packs,
        "padding": counts.padding / (counts.packs * length),
        "cut": counts.cut_documents / counts.documents,
        "longer": float((lengths > length).mean()),
    }


ALONE = {"plan": plan_alone, "start": start_alone, "index": index_alone, "pack": pack_alone}


def in_own_process(kind: str, folder: Path, length: int, packing: str, number: int) -> dict[str, Any]:
    """One of ``ALONE`` in a fresh interpreter."""
    command = [sys.executable, __file__, "--alone", kind, str(folder), str(length), packing, str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(kind, length, packing, number, json.dumps(result), flush=True)
    return result


def measure(folder: Path, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write the corpora, then everything that is measured, by name."""
    draw = np.random.default_rng(0)
    sizes = [tokens * part // 55 for part in range(1, SOURCES + 1)]
    index = documents = 0
    for number, size in enumerate(sizes):
        lengths = log_normal(size // MEAN, MEAN, SIGMA, draw)
        documents += len(lengths)
        index += big_corpus(folder / f"source{number}", lengths)
    yield "corpora", {"tokens": tokens, "documents": documents, "index_bytes": index}
    big_corpus(folder / "million", log_normal(DOCUMENTS, MEAN, SIGMA, draw))
    for name, length in LENGTHS.items():
        for packing in ("chop", "best_fit"):
            far = max(STARTS) if (name, packing) == ("8K", "chop") else 10**9
            yield f"plan {name} {packing}", in_own_process("plan", folder, length, packing, far + STEP_TOKENS)
    for seen in STARTS:
        yield f"start 8K chop {seen}", in_own_process("start", folder, LENGTHS["8K"], "chop", seen)
    for name, length in LENGTHS.items():
        yield f"index {name}", in_own_process("index", folder, length, "-", tokens)
        yield f"pack {name} chop", in_own_process("pack", folder, length, "chop", 0)
        for window in WINDOWS:
            yield f"pack {name} best_fit {window}", in_own_process("pack", folder, length, "best_fit", window)


def table(found: dict[str, dict[str, Any]]) -> str:
    """What README.md tells of, in Markdown."""
    corpora = found["corpora"]
    lines = [
        f"{SOURCES} sources, {corpora['tokens'] / 1e9:g}B tokens in {corpora['documents'] / 1e6:.1f}M documents "
        f"(log-normal, mean {MEAN:,}, sigma {SIGMA}), .idx files of {corpora['index_bytes'] / 1e6:,.0f} MB. "
        "Seconds are of the CPU.",
        "",
        "| pack | packing | open, s | open, MB | plan, s per 1B tokens | us a pack | MB | 7.5T (extrapolated), h | "
        "state, KB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, length in LENGTHS.items():
        for packing in ("chop", "best_fit"):
            row = found[f"plan {name} {packing}"]
            second = row["plan"]["cpu_s"] / row["tokens"]
            lines.append(
                f"| {name} | {packing} | {row['open']['cpu_s']:.3f} | {row['open']['memory'] / 1e6:.1f} | "
                f"{second * 1e9:.2f} | {second * length * 1e6:,.0f} | {row['plan']['memory'] / 1e6:.1f} | "
                f"{second * ALL_TOKENS / 3600:.1f} | {row['state'] / 1e3:.0f} |"
            )
    lines += ["", "| start after tokens | s to the first step's plans | MB |", "|---|---|---|"]
    for seen in STARTS:
        row = found[f"start 8K chop {seen}"]
        lines.append(f"| {seen / 1e9:g}B | {row['cpu_s']:.3f} | {row['memory'] / 1e6:.1f} |")
    lines += [
        "",
        "| GPTDataset, pack | build, s | s per 1B tokens | 7.5T (extrapolated), min | MB | disk, MB | 7.5T, GB | "
        "opened again, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in LENGTHS:
        row = found[f"index {name}"]
        scale = ALL_TOKENS / corpora["tokens"]
        lines.append(
            f"| {name} | {row['build']['cpu_s']:.1f} | {row['build']['cpu_s'] / corpora['tokens'] * 1e9:.2f} | "
            f"{row['build']['cpu_s'] * scale / 60:.0f} | {row['build']['memory'] / 1e6:,.0f} | "
            f"{row['disk'] / 1e6:,.0f} | {row['disk'] * scale / 1e9:,.0f} | {row['again']['cpu_s']:.2f} |"
        )
    lines += [
        "",
        "| a million documents | packs | padding, % | cut documents, % | longer than a pack, % | s |",
        "|---|---|---|---|---|---|",
    ]
    for name in LENGTHS:
        for packing in ("chop", *(f"best_fit {window}" for window in WINDOWS)):
            row = found[f"pack {name} {packing}"]
            lines.append(
                f"| {name}, {packing} | {row['packs']:,} | {100 * row['padding']:.4f} | {100 * row['cut']:.3f} | "
                f"{100 * row['longer']:.3f} | {row['cpu_s']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Start-up by tokens seen, planning against building, and what packing costs."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))
    seen = [start / 1e9 for start in STARTS]
    left.plot(
        seen, [found[f"start 8K chop {start}"]["cpu_s"] for start in STARTS], "o-", label="stream, to its first step"
    )
    for key, label in (("build", "GPTDataset, first start"), ("again", "GPTDataset, indices there")):
        left.axhline(
            found["index 8K"][key]["cpu_s"], color="tab:orange" if key == "build" else "tab:green", label=label
        )
    left.set(yscale="log", xlabel="tokens seen, B", ylabel="CPU seconds", title="Start-up, packs of 8K")
    left.legend(fontsize=8)
    names = [f"{name} {packing}" for name in LENGTHS for packing in ("chop", "best_fit")]
    seconds = [found[f"plan {name}"]["plan"]["cpu_s"] / found[f"plan {name}"]["tokens"] * 1e9 for name in names]
    names += [f"{name} GPTDataset" for name in LENGTHS]
    seconds += [found[f"index {name}"]["build"]["cpu_s"] / found["corpora"]["tokens"] * 1e9 for name in LENGTHS]
    middle.barh(names, seconds, color=["tab:blue"] * 4 + ["tab:orange"] * 2)
    middle.invert_yaxis()
    middle.set(xlabel="CPU seconds per 1B tokens", title="Planning (while training), and building")
    bars = [f"{name} {packing}" for name in LENGTHS for packing in ("chop", f"best_fit {WINDOWS[-1]}")]
    places = np.arange(len(bars))
    for shift, key, label in ((-0.2, "padding", "padding, of tokens"), (0.2, "cut", "cut, of documents")):
        shares = [100 * found[f"pack {bar}"][key] for bar in bars]
        right.bar_label(right.bar(places + shift, shares, 0.4, label=label), fmt="%.2g", fontsize=7)
    right.set_xticks(places, [bar.rsplit(" ", 1)[0] if bar[-1].isdigit() else bar for bar in bars])
    right.set(ylabel="%", title="A million documents")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Measure, check, write; status 1 when a start after more tokens takes longer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alone", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=float, default=2e10, help="of the blend (default: 20e9)")
    parser.add_argument("--folder", type=Path, help="where the corpora are made for the time being")
    options = parser.parse_args()
    if options.alone:
        kind, folder, length, packing, number = options.alone
        print(json.dumps(ALONE[kind](Path(folder), int(length), packing, int(number))))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = dict(measure(Path(folder), int(options.tokens)))
    content = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("numpy", "megatron-core")},
        "result": found,
    }
    write_atomically(RESULTS / "data_scale.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(RESULTS / "data_scale.md", table(found).encode())
    plot(found, RESULTS / "data_scale.png")
    print(table(found))
    starts = [found[f"start 8K chop {seen}"]["cpu_s"] for seen in STARTS]
    # Twice is noise of a start of milliseconds; ten times the tokens would be ten times the work.
    return int(any(after > 2 * before for before, after in pairwise(starts)))


if __name__ == "__main__":
    sys.exit(main())
