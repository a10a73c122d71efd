"""From text to Megatron's ``.bin`` and ``.idx``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_m1.cores import usable_cores
from megatron_m1.data.corpora.prefix import is_split_part
from megatron_m1.data.tokenize.documents import RawBatch, SkipReason
from megatron_m1.data.tokenize.encode import EncodedBatch, encode_batch
from megatron_m1.data.tokenize.encode_pool import encode_in_pool
from megatron_m1.data.tokenize.find import PassedOver, find_inputs
from megatron_m1.data.tokenize.memory import check_text_files
from megatron_m1.data.tokenize.outputs import check_outputs, working_folder
from megatron_m1.data.tokenize.readers import read_batches
from megatron_m1.data.tokenize.split import SUFFIXES, WHOLE, Split
from megatron_m1.data.tokenize.split_writer import SplitWriter
from megatron_m1.data.tokenizers import Tokenizer, load_tokenizer
from megatron_m1.files import file_lock
from megatron_m1.printing import counted


@dataclass(frozen=True)
class HeldOut:
    """A part that was held out."""

    prefix: str
    documents: int
    tokens: int
    """End marks included."""

    def __str__(self) -> str:
        return f"{self.prefix}: {counted(self.documents, 'document')}, {counted(self.tokens, 'token')}, held out"


@dataclass(frozen=True)
class TokenizeReport:
    """What became of the documents: the numbers are of what is left for training."""

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
    held_out: list[HeldOut] = field(default_factory=list)
    """The other parts, if the corpus was split."""
    keys: tuple[str, ...] = ()
    """Keys of the first record without the text's."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.text_bytes / self.tokens

    def __str__(self) -> str:
        lines = [
            f"{self.prefix}: {counted(self.documents, 'document')}, {counted(self.tokens, 'token')}, "
            f"{self.bytes_per_token:.2f} bytes per token, skipped: {_reasons(self.skipped, self.keys)}, "
            f"{self.seconds:.1f} s"
        ]
        return "\n".join([*map(str, self.passed_over), *lines, *map(str, self.held_out)])


def _reasons(skipped: Mapping[str, int], keys: Sequence[str] = ()) -> str:
    named = f" (the first such record has {', '.join(keys)})" if keys else ""
    return (
        ", ".join(
            f"{count:,} {reason}{named if reason == SkipReason.KEY_MISSING else ''}"
            for reason, count in sorted(skipped.items())
        )
        or "none"
    )


def tokenize_corpus(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    *,
    text_key: str = "text",
    text_suffixes: Collection[str] = (),
    split: Split = WHOLE,
    workers: int | None = None,
    append_eod: bool = True,
    show_progress: bool = True,
    note: Callable[[str], None] = lambda line: None,
) -> TokenizeReport:
    """Tokenise documents into ``<output_prefix>.bin``, ``.idx`` and ``.json``, what is held out into files beside them.

    The output does not depend on the number of workers. A good output is replaced only once the new one is whole; a
    kill between the two files leaves no ``.idx``, never one that belongs to another ``.bin``.

    Args:
        inputs: files, folders or globs, see ``find.find_inputs``.
        output_prefix: path without suffix; its folder is made.
        tokenizer_path: a SentencePiece ``.model`` or a Hugging Face tokenizer folder.
        text_key: key of a JSON object, or Parquet column, that holds the text.
        text_suffixes: of files that are text besides the usual ones, from ``find.text_suffix``.
        split: shares of training, validation and test, from ``split.parse_split``; the latter two get the prefixes
            ``<output_prefix>_validation`` and ``<output_prefix>_test``.
        workers: processes that tokenise; 1 does it in this process; none takes one per usable core.
        append_eod: end each document with the tokenizer's eod.
        show_progress: draw a progress bar if stderr is a terminal.
        note: is told, line by line, what had to be assumed of the tokenizer.

    Raises:
        FileNotFoundError: an input or the tokenizer does not exist.
        ValueError: a truncated or unknown input file, a bad tokenizer or number of workers, no document left (in a
            part), another process is writing the same prefix, or what would be replaced is read or was not made by this
            function.
        RuntimeError: a worker process failed or was killed.
    """
    started = perf_counter()
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}; use at least 1")
    prefix = str(output_prefix)
    prefixes = [prefix + SUFFIXES[part] for part in split.parts]
    found = find_inputs(inputs, text_suffixes)
    files = found.files
    tokenizer = load_tokenizer(tokenizer_path)
    for each in prefixes:
        check_outputs(each, files, Path(tokenizer_path))
    for line in (*tokenizer.notes, *_stale_notes(prefix, prefixes)):
        note(line)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    cut = tokenizer.line_cut
    if cut is None:
        check_text_files(files, text_suffixes)
    total_bytes = sum(file.stat().st_size for file in files)
    with ExitStack() as stack:
        folders = [stack.enter_context(_sole_writer(each)) for each in prefixes]
        progress = stack.enter_context(_progress(total_bytes, show_progress))
        # A process that is killed could not show it again.
        progress.console.show_cursor(True)
        writer = stack.enter_context(SplitWriter(folders, tokenizer, split, append_eod=append_eod))
        batches = read_batches(files, text_key=text_key, cut=cut, text_suffixes=text_suffixes)
        stack.enter_context(closing(batches))
        task = progress.add_task(f"tokenising {counted(len(files), 'file')}", total=total_bytes, documents=0)
        if workers == 1:
            encoded = _encode_here(batches, tokenizer, text_key, append_eod)
        else:
            encoded = encode_in_pool(
                batches,
                Path(tokenizer_path),
                text_key=text_key,
                append_eod=append_eod,
                workers=workers,
                folder=folders[0],
            )
        for file_bytes, result in stack.enter_context(closing(encoded)):
            writer.add(result)
            progress.update(task, advance=file_bytes, documents=writer.documents)
        if not writer.documents:
            raise ValueError(
                f"{files[0]}{' and the other inputs have' if files[1:] else ' has'} no document that can be used "
                f"(skipped: {_reasons(writer.skipped, writer.keys)}): correct the input, or name its text with "
                "--text-key"
            )
        writer.check_parts()
        writer.commit(prefix)
    return _report(writer, prefix, found.passed_over, perf_counter() - started)


def _report(writer: SplitWriter, prefix: str, passed_over: list[PassedOver], seconds: float) -> TokenizeReport:
    train = writer.writers[0]
    others = {prefix + SUFFIXES[part]: files for part, files in writer.writers.items() if part}
    return TokenizeReport(
        prefix,
        train.documents,
        train.tokens,
        train.text_bytes,
        dict(writer.skipped),
        seconds,
        passed_over,
        [HeldOut(name, files.documents, files.tokens) for name, files in others.items()],
        writer.keys,
    )


def _stale_notes(prefix: str, written: Sequence[str]) -> list[str]:
    """Warn of a held-out part that stays from another split: documents of it may be trained on from now on."""
    others = (prefix + suffix for suffix in SUFFIXES)
    return [
        f"{other} is of an earlier --split, and documents of it may be in {prefix} now: remove it, or split as before"
        for other in others
        if other not in written and is_split_part(other)
    ]


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
