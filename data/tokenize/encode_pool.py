"""Batches encoded by several processes, their results in the order of reading."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from megatron_m1.data.tokenize.documents import RawBatch
from megatron_m1.data.tokenize.encode import EncodedBatch, Encoder, encode_batch_in_worker, prepare_worker

_BATCHES_AHEAD = 4
"""Batches in flight per worker: bounds the memory however large the input is."""
_BYTES_AHEAD = 1 << 26
"""The same in bytes of text, beside the largest batch: documents that can't be cut are batches of any size."""
_HELD_BYTES = 1 << 26
"""Tokens held in memory that wait for an earlier batch; what is more waits on disk."""


def encode_in_pool(
    batches: Iterator[RawBatch],
    encoder: Encoder,
    *,
    workers: int,
    folder: Path,
) -> Generator[tuple[int, EncodedBatch]]:
    """Encode batches in ``workers`` processes.

    A batch that takes long, for it is one large document, keeps no other process waiting: the batches behind it go on,
    and their results are kept until its own is there.

    Args:
        batches: read one by one, as processes come free.
        encoder: what every process does to a batch.
        workers: at least 1.
        folder: for a file without a name with results that wait.

    Yields:
        File bytes of a batch, and its result, in the order of reading.

    Raises:
        RuntimeError: a process failed or was killed.
    """
    # Fresh interpreters: a fork of a process with threads can hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=prepare_worker)
    waiting: deque[_Waiting] = deque()
    running: dict[Future[EncodedBatch], _Waiting] = {}
    try:
        with _Shelf(folder) as shelf:
            while True:
                while _has_room(running.values(), workers) and (batch := next(batches, None)) is not None:
                    future = pool.submit(encode_batch_in_worker, encoder, batch)
                    running[future] = _Waiting(batch.file, batch.size, batch.file_bytes)
                    waiting.append(running[future])
                if not waiting:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done = running.pop(future)
                    done.result = shelf.put(_result(future, done.file))
                while waiting and (take := waiting[0].result) is not None:
                    yield waiting.popleft().file_bytes, take()
    except BrokenProcessPool as error:
        raise RuntimeError("a tokenising process was killed (out of memory?); use fewer workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class _Waiting:
    """A batch that was read and not yet handed on."""

    file: Path
    size: int
    file_bytes: int
    result: Callable[[], EncodedBatch] | None = None


def _has_room(running: Collection[_Waiting], workers: int) -> bool:
    sizes = [batch.size for batch in running]
    return len(sizes) < _BATCHES_AHEAD * workers and sum(sizes) - max(sizes, default=0) < _BYTES_AHEAD


def _result(future: Future[EncodedBatch], file: Path) -> EncodedBatch:
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        raise RuntimeError(f"tokenising {file} failed: {error!r}") from error


class _Shelf:
    """Results that wait for an earlier one: in memory up to a limit, beyond it in a file."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed at the end of the block)
        self._held = self._stored = 0

    def __enter__(self) -> _Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, result: EncodedBatch) -> Callable[[], EncodedBatch]:
        """Keep a result; what is returned gives it back, once."""
        size = _array_bytes(result)
        if self._held + size <= _HELD_BYTES:
            self._held += size
            return partial(self._from_memory, result)
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(result.tokens)
        if result.loss is not None:
            self._file.write(result.loss)
        self._stored += 1
        loss = None if result.loss is None else result.loss[:0].copy()
        rest = replace(result, tokens=result.tokens[:0].copy(), loss=loss)
        return partial(self._from_file, rest, place, result.tokens.size)

    def _from_memory(self, result: EncodedBatch) -> EncodedBatch:
        self._held -= _array_bytes(result)
        return result

    def _from_file(self, result: EncodedBatch, place: int, size: int) -> EncodedBatch:
        self._file.seek(place)
        tokens = np.frombuffer(self._file.read(size * result.tokens.itemsize), dtype=result.tokens.dtype)
        loss = None if result.loss is None else np.frombuffer(self._file.read(size), dtype=np.uint8)
        self._stored -= 1
        if not self._stored:
            self._file.truncate(0)
        return replace(result, tokens=tokens, loss=loss)


def _array_bytes(result: EncodedBatch) -> int:
    return result.tokens.nbytes + (0 if result.loss is None else result.loss.nbytes)
