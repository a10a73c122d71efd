"""CPU time and memory of ``megatron-m1 tokenize`` against plain loops of the tokenizers' own libraries.

Run ``python benchmarks/tokenise.py``: ten minutes on two cores. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

RESULTS = Path(__file__).resolve().parent / "results"
END_MARK = "<|end|>"
# As in Llama 3's tokenizer.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
VOCABULARY = 128_000
PIECES = 32_000
SENTENCEPIECE_TRAINING = 8_000_000
"""Bytes of text that the SentencePiece model is trained on; the other sees all text."""
BATCH = 512
WORKERS = 2
SPEED_LIMIT = 1.1
MEMORY_LIMIT = 300 * 10**6


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    cpu_s: float
    """User and system time of the process and all that it started."""
    wall_s: float
    main_mb: float
    """Most resident memory of the process itself."""
    child_mb: float
    """Most resident memory of one that it started; 0 without any."""


def source_files() -> Iterator[Path]:
    """Python files of the installed packages, then of the standard library, in a constant order."""
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys((paths["purelib"], paths["platlib"], paths["stdlib"])):
        yield from sorted(Path(folder).rglob("*.py"))


def write_corpus(path: Path, size: int) -> list[str]:
    """Write about ``size`` bytes of source code as JSON lines, one file a document; returns the documents."""
    texts: list[str] = []
    written = 0
    for file in source_files():
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if written < size and text.strip():
            texts.append(text)
            written += len(text.encode())
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def train_bpe(folder: Path, texts: list[str]) -> None:
    """Write a byte-level BPE tokenizer folder of ``VOCABULARY`` tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(END_MARK, special=True)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_MARK}))


def plain_loop(kind: str, corpus: Path, tokenizer: Path, out: Path) -> None:
    """Parse the lines, encode them in batches on one core, write the ids with end marks: nothing else."""
    encode: Callable[[list[str]], list[list[int]]]
    if kind == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        end, size = processor.eos_id(), processor.vocab_size()

        def encode(texts: list[str]) -> list[list[int]]:
            return processor.encode(texts, num_threads=1)  # type: ignore[no-any-return]
    else:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        end, size = backend.token_to_id(END_MARK), backend.get_vocab_size()
        method = getattr(backend, kind)

        def encode(texts: list[str]) -> list[list[int]]:
            return [encoding.ids for encoding in method(texts, add_special_tokens=False)]

    dtype = np.uint16 if size < 65_500 else np.int32
    texts: list[str] = []
    with corpus.open("rb") as lines, out.open("wb") as stream:
        for line in lines:
            texts.append(json.loads(line)["text"])
            if len(texts) == BATCH:
                _write(stream, encode(texts), end, dtype)
                texts = []
        _write(stream, encode(texts), end, dtype)


def _write(stream: Any, documents: list[list[int]], end: int, dtype: Any) -> None:
    for ids in documents:
        stream.write(np.array([*ids, end], dtype=dtype))


def measure(command: list[str]) -> Cost:
    """Run a command to its end.

    Raises:
        RuntimeError: it fails.
    """
    began = time.perf_counter()
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as said:
        process = psutil.Popen(command, stdout=said, stderr=said, env=environment)
        main = child = 0
        while True:
            # Memory falls before a process ends, so that its peak is seen between two looks.
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            try:
                main = max(main, process.memory_info().rss)
                child = max([child, *(one.memory_info().rss for one in process.children(recursive=True))])
            except psutil.Error:
                pass
            time.sleep(0.02)
        wall = time.perf_counter() - began
        if status:
            said.seek(0)
            raise RuntimeError(f"{command} failed: {said.read().decode()[-2000:]}")
    process.returncode = status
    return Cost(usage.ru_utime + usage.ru_stime, wall, main / 1e6, child / 1e6)


def ours(corpus: Path, tokenizer: Path, out: Path) -> list[str]:
    """The command with two workers."""
    call = "import sys; from megatron_m1.cli import run; sys.exit(run(sys.argv[1:]))"
    options = ["--tokenizer", str(tokenizer), "--output", str(out), "--workers", str(WORKERS)]
    return [sys.executable, "-c", call, "tokenize", str(corpus), *options]


def plain(kind: str, corpus: Path, tokenizer: Path, out: Path) -> list[str]:
    """This file's loop in a process of its own."""
    return [sys.executable, __file__, "--alone", kind, str(corpus), str(tokenizer), f"{out}.bin"]


def megatron(tools: Path, corpus: Path, tokenizer: Path, out: Path) -> list[str]:
    """Megatron-LM's ``preprocess_data.py`` with two workers."""
    kind, model = ("SentencePieceTokenizer", tokenizer) if tokenizer.is_file() else ("HuggingFaceTokenizer", tokenizer)
    return [
        # Its own core, not the installed one.
        *("env", f"PYTHONPATH={tools}"),
        *(sys.executable, str(tools / "tools" / "preprocess_data.py"), "--input", str(corpus), "--append-eod"),
        *("--tokenizer-type", kind, "--tokenizer-model", str(model), "--workers", str(WORKERS)),
        *("--output-prefix", str(out)),
    ]


def take_turns(
    root: Path, corpus: Path, tokenizer: Path, kinds: list[str], tools: Path | None, rounds: int
) -> dict[str, list[Cost]]:
    """All sides once a round; their ids must be the same.

    Raises:
        ValueError: they are not.
    """
    sides = {"ours": ours(corpus, tokenizer, root / "ours")}
    sides |= {kind: plain(kind, corpus, tokenizer, root / kind) for kind in kinds}
    files = {name: root / f"{name}.bin" for name in sides}
    if tools is not None:
        sides["megatron"] = megatron(tools, corpus, tokenizer, root / "megatron")
        files["megatron"] = root / "megatron_text_document.bin"
    found: dict[str, list[Cost]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, command in sides.items():
            found[name].append(measure(command))
    expected = files["ours"].read_bytes()
    for name, file in files.items():
        if file.read_bytes() != expected:
            raise ValueError(f"refusing to report: {name} has other ids")
    return found


def start_up(root: Path, tokenizer: Path) -> Cost:
    """What the command takes for one word."""
    (root / "word.jsonl").write_text('{"text": "word"}\n')
    return min((measure(ours(root / "word.jsonl", tokenizer, root / "word")) for _ in range(3)), key=_cpu)


def _cpu(cost: Cost) -> float:
    return cost.cpu_s


def report(name: str, found: dict[str, list[Cost]], start: Cost, size: int) -> dict[str, Any]:
    """Print and return the sides' fastest rounds, relative to ours."""
    # Everything that disturbs a round makes it longer.
    best = {side: min(costs, key=_cpu).cpu_s for side, costs in found.items()}
    ratios = {side: best["ours"] / cpu for side, cpu in best.items() if side != "ours"}
    memory = max(cost.child_mb for cost in found["ours"])
    main_memory = max(cost.main_mb for cost in found["ours"])
    fastest = max(ratios[side] for side in ratios if side != "megatron")
    told = ", ".join(f"{ratio:.2f} times {side}" for side, ratio in ratios.items())
    print(
        f"{name}: {size / 1e6:.0f} MB, our CPU time {best['ours']:.1f} s ({start.cpu_s:.1f} s of it to start) is "
        f"{told} "
        f"(at most {SPEED_LIMIT}); {memory:.0f} MB a worker (below {MEMORY_LIMIT / 1e6:.0f}), {main_memory:.0f} MB in "
        "the main process"
    )
    return {
        "cpu_s": best,
        "ours_to_others": ratios,
        "start_up_cpu_s": start.cpu_s,
        "worker_mb": memory,
        "main_mb": main_memory,
        "speed_kept": fastest <= SPEED_LIMIT,
        "memory_kept": memory * 1e6 < MEMORY_LIMIT,
    }


def large_document(root: Path, texts: list[str], tokenizer: Path) -> dict[str, float]:
    """All text as one document: its costs with two workers."""
    path = root / "large.txt"
    path.write_text("\n".join(texts))
    cost = measure(ours(path, tokenizer, root / "large"))
    print(f"one document of {path.stat().st_size / 1e6:.0f} MB: {cost.wall_s:.1f} s, {cost.child_mb:.0f} MB a worker")
    return asdict(cost) | {"bytes": path.stat().st_size}


def main() -> int:
    """Run everything; status 1 when a limit is not kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--alone", nargs=4, metavar=("KIND", "CORPUS", "TOKENIZER", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, default=40_000_000, help="of source code (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM, to compare with its tool as well")
    options = parser.parse_args()
    if options.alone is not None:
        kind, *paths = options.alone
        plain_loop(kind, *map(Path, paths))
        return 0
    from megatron_m1.data.tokenizers import train_sentencepiece

    results: dict[str, Any] = {}
    found: dict[str, dict[str, list[Cost]]] = {}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        texts = write_corpus(root / "corpus.jsonl", options.bytes)
        size = sum(len(text.encode()) for text in texts)
        folder, model = root / "bpe", root / "pieces.model"
        train_bpe(folder, texts)
        step = 1 + size // SENTENCEPIECE_TRAINING
        train_sentencepiece(texts[::step], model, vocab_size=PIECES)
        for name, path, kinds in (
            ("Hugging Face", folder, ["encode_batch", "encode_batch_fast"]),
            ("SentencePiece", model, ["sentencepiece"]),
        ):
            place = root / name
            place.mkdir()
            found[name] = take_turns(place, root / "corpus.jsonl", path, kinds, options.megatron, options.rounds)
            results[name] = report(name, found[name], start_up(place, path), size)
            results[name]["one_document"] = large_document(place, texts, path)
    content = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("tokenizers", "sentencepiece", "numpy")},
        "bytes": size,
        "documents": len(texts),
        "workers": WORKERS,
        "rounds": options.rounds,
        "result": results,
        "all": {
            name: {side: [asdict(cost) for cost in costs] for side, costs in one.items()} for name, one in found.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tokenise.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0 if all(result["speed_kept"] and result["memory_kept"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
