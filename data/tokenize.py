"""From text to Megatron's ``.bin`` and ``.idx``."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_m1.data.cores import usable_cores
from megatron_m1.data.encode import EncodedBatch, encode_batch, encode_batch_in_worker, prepare_worker
from megatron_m1.data.files import file_lock, write_atomically
from megatron_m1.data.outputs import check_outputs, working_folder
from megatron_m1.data.prefix import bin_path, idx_path, sidecar_path
from megatron_m1.data.readers import RawBatch, find_files, read_batches
from megatron_m1.data.tokenizers import Tokenizer, load_tokenizer

_BATCHES_AHEAD = 4
"""Batches in flight per worker: bounds the memory however large the input is."""


@dataclass(frozen=True)
class TokenizeReport:
    """What became of the documents."""

    prefix: str
    documents: int
    tokens: int
    """End marks included."""
    text_bytes: int
    """UTF-8 bytes of the documents kept."""
    skipped: dict[str, int]
    """Documents left out, by reason."""
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.text_bytes / self.tokens

    def __str__(self) -> str:
        return (
            f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, {self.bytes_per_token:.2f} bytes per"
            f" token, skipped: {_reasons(self.skipped)}, {self.seconds:.1f} s"
        )


def _reasons(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items())) or "none"


def tokenize_corpus(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    *,
    text_key: str = "text",
    workers: int | None = None,
    append_eod: bool = True,
    show_progress: bool = True,
) -> TokenizeReport:
    """Tokenise documents into ``<output_prefix>.bin``, ``.idx`` and ``.json``.

    The output does not depend on the number of workers. A good output is replaced only once the new one is whole; a
    kill between the two files leaves no ``.idx``, never one that belongs to another ``.bin``.

    Args:
        inputs: files, folders or globs, see ``readers.find_files``.
        output_prefix: path without suffix; its folder is made.
        tokenizer_path: a SentencePiece ``.model`` or a Hugging Face tokenizer folder.
        text_key: key of a JSON object, or Parquet column, that holds the text.
        workers: processes that tokenise; 1 does it in this process; none takes one per usable core.
        append_eod: end each document with the tokenizer's eod.
        show_progress: draw a progress bar if stderr is a terminal.

    Raises:
        FileNotFoundError: an input or the tokenizer does not exist.
        ValueError: a truncated or unknown input file, a bad tokenizer or number of workers, no document left, another
            process is writing the same prefix, or what would be replaced is read or was not made by this function.
        RuntimeError: a worker process failed or was killed.
    """
    started = perf_counter()
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}; use at least 1")
    prefix = str(output_prefix)
    files = find_files(inputs)
    tokenizer = load_tokenizer(tokenizer_path)
    check_outputs(prefix, files, Path(tokenizer_path))
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    total_bytes = sum(file.stat().st_size for file in files)
    with _sole_writer(prefix) as partial, _progress(total_bytes, show_progress) as progress:
        writer = _Writer(partial, tokenizer, append_eod)
        batches = read_batches(files, text_key=text_key)
        task = progress.add_task(f"tokenising {len(files)} files", total=total_bytes, documents=0)
        if workers == 1:
            encoded = _encode_here(batches, tokenizer, text_key, append_eod)
        else:
            encoded = _encode_in_pool(batches, Path(tokenizer_path), text_key, append_eod, workers)
        with closing(batches), closing(encoded):
            for raw, result in encoded:
                writer.add(result)
                progress.update(task, advance=raw.file_bytes, documents=writer.documents)
        if not writer.documents:
            raise ValueError(
                f"{files[0]}{' and the other inputs have' if files[1:] else ' has'} no document that can be used "
                f"(skipped: {_reasons(writer.skipped)}): correct the input, or name its text with --text-key"
            )
        writer.commit(prefix)
    return TokenizeReport(
        prefix, writer.documents, writer.tokens, writer.text_bytes, dict(writer.skipped), perf_counter() - started
    )


class _Writer:
    """Gathers encoded batches in a folder of its own, then puts the files in place."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, append_eod: bool) -> None:
        self.documents = self.tokens = self.text_bytes = 0
        self.skipped: Counter[str] = Counter()
        self._bin, self._idx = folder / "tokens.bin", folder / "tokens.idx"
        self._tokenizer = tokenizer
        self._append_eod = append_eod
        self._dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self._builder = IndexedDatasetBuilder(str(self._bin), dtype=self._dtype)

    def add(self, batch: EncodedBatch) -> None:
        """Append the documents of a batch."""
        for document in np.split(batch.tokens, np.cumsum(batch.lengths)[:-1]) if batch.lengths else []:
            self._builder.add_item(torch.from_numpy(document))
            self._builder.end_document()
        self.documents += len(batch.lengths)
        self.tokens += batch.tokens.size
        self.text_bytes += batch.text_bytes
        self.skipped += batch.skipped

    def commit(self, prefix: str) -> None:
        """Replace an older output. The .idx makes a corpus of the files: the old one goes first, the new comes last."""
        self._builder.finalize(str(self._idx))
        for path in (self._bin, self._idx):
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        sidecar = {
            "tokenizer_digest": self._tokenizer.digest(),
            "vocab_size": self._tokenizer.vocab_size,
            "eod": self._tokenizer.eod if self._append_eod else None,
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "skipped": dict(self.skipped),
        }
        idx_path(prefix).unlink(missing_ok=True)
        # By the sidecar the files are known as ours, so that the command may replace them after a kill.
        write_atomically(sidecar_path(prefix), json.dumps(sidecar, indent=1).encode())
        self._bin.replace(bin_path(prefix))
        self._idx.replace(idx_path(prefix))


@contextmanager
def _sole_writer(prefix: str) -> Iterator[Path]:
    """``working_folder``, and no other process has it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(Path(f"{prefix}.lock"), wait=False))
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {prefix}; wait for it or choose another output") from error
        yield stack.enter_context(working_folder(prefix))


def _progress(total_bytes: int, show: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[documents]:,} documents"),
        TimeRemainingColumn(),
        console=console,
        disable=not (show and console.is_terminal and total_bytes),
    )


def _encode_here(
    batches: Iterator[RawBatch], tokenizer: Tokenizer, text_key: str, append_eod: bool
) -> Generator[tuple[RawBatch, EncodedBatch]]:
    for batch in batches:
        yield batch, encode_batch(tokenizer, batch, text_key=text_key, append_eod=append_eod)


def _encode_in_pool(
    batches: Iterator[RawBatch], tokenizer_path: Path, text_key: str, append_eod: bool, workers: int
) -> Generator[tuple[RawBatch, EncodedBatch]]:
    """Batches with their results, in the order of reading."""
    # Fresh interpreters: a fork of a process with torch's threads can hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=prepare_worker)
    waiting: deque[tuple[RawBatch, Future[EncodedBatch]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(encode_batch_in_worker, tokenizer_path, batch, text_key, append_eod)))
            if len(waiting) >= _BATCHES_AHEAD * workers:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    except BrokenProcessPool as error:
        raise RuntimeError("a tokenising process was killed (out of memory?); use fewer workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(batch: RawBatch, future: Future[EncodedBatch]) -> tuple[RawBatch, EncodedBatch]:
    try:
        return batch, future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        raise RuntimeError(f"tokenising {batch.file} failed: {error!r}") from error
