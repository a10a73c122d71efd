"""From text to Megatron's ``.bin`` and ``.idx``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_m1.cores import usable_cores
from megatron_m1.data.tokenize.documents import RawBatch
from megatron_m1.data.tokenize.encode import EncodedBatch, encode_batch
from megatron_m1.data.tokenize.encode_pool import encode_in_pool
from megatron_m1.data.tokenize.find import PassedOver, find_inputs
from megatron_m1.data.tokenize.memory import check_text_files
from megatron_m1.data.tokenize.outputs import check_outputs, working_folder
from megatron_m1.data.tokenize.readers import read_batches
from megatron_m1.data.tokenize.token_files import TokenWriter
from megatron_m1.data.tokenizers import Tokenizer, load_tokenizer
from megatron_m1.files import file_lock


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
    passed_over: list[PassedOver] = field(default_factory=list)
    """What of folders and globs was no input."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.text_bytes / self.tokens

    def __str__(self) -> str:
        lines = [
            f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, {self.bytes_per_token:.2f} bytes per"
            f" token, skipped: {_reasons(self.skipped)}, {self.seconds:.1f} s"
        ]
        return "\n".join([*map(str, self.passed_over), *lines])


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
    note: Callable[[str], None] = lambda line: None,
) -> TokenizeReport:
    """Tokenise documents into ``<output_prefix>.bin``, ``.idx`` and ``.json``.

    The output does not depend on the number of workers. A good output is replaced only once the new one is whole; a
    kill between the two files leaves no ``.idx``, never one that belongs to another ``.bin``.

    Args:
        inputs: files, folders or globs, see ``find.find_inputs``.
        output_prefix: path without suffix; its folder is made.
        tokenizer_path: a SentencePiece ``.model`` or a Hugging Face tokenizer folder.
        text_key: key of a JSON object, or Parquet column, that holds the text.
        workers: processes that tokenise; 1 does it in this process; none takes one per usable core.
        append_eod: end each document with the tokenizer's eod.
        show_progress: draw a progress bar if stderr is a terminal.
        note: is told, line by line, what had to be assumed of the tokenizer.

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
    found = find_inputs(inputs)
    files = found.files
    tokenizer = load_tokenizer(tokenizer_path)
    check_outputs(prefix, files, Path(tokenizer_path))
    for line in tokenizer.notes:
        note(line)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    cut = tokenizer.line_cut
    if cut is None:
        check_text_files(files)
    total_bytes = sum(file.stat().st_size for file in files)
    with ExitStack() as stack:
        partial = stack.enter_context(_sole_writer(prefix))
        progress = stack.enter_context(_progress(total_bytes, show_progress))
        writer = stack.enter_context(TokenWriter(partial, tokenizer, append_eod=append_eod))
        batches = stack.enter_context(closing(read_batches(files, text_key=text_key, cut=cut)))
        task = progress.add_task(f"tokenising {len(files)} files", total=total_bytes, documents=0)
        if workers == 1:
            encoded = _encode_here(batches, tokenizer, text_key, append_eod)
        else:
            encoded = encode_in_pool(
                batches,
                Path(tokenizer_path),
                text_key=text_key,
                append_eod=append_eod,
                workers=workers,
                folder=partial,
            )
        for file_bytes, result in stack.enter_context(closing(encoded)):
            writer.add(result)
            progress.update(task, advance=file_bytes, documents=writer.documents)
        if not writer.documents:
            raise ValueError(
                f"{files[0]}{' and the other inputs have' if files[1:] else ' has'} no document that can be used "
                f"(skipped: {_reasons(writer.skipped)}): correct the input, or name its text with --text-key"
            )
        writer.commit(prefix)
    return TokenizeReport(
        prefix,
        writer.documents,
        writer.tokens,
        writer.text_bytes,
        dict(writer.skipped),
        perf_counter() - started,
        found.passed_over,
    )


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
) -> Generator[tuple[int, EncodedBatch]]:
    for batch in batches:
        yield batch.file_bytes, encode_batch(tokenizer, batch, text_key=text_key, append_eod=append_eod)
