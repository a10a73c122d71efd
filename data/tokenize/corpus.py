"""From text to Megatron's ``.bin`` and ``.idx``."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_m1.cores import usable_cores
from megatron_m1.data.chat.options import MESSAGES_KEY, ChatOptions
from megatron_m1.data.tokenize.buckets import NO_BUCKETS, LengthBuckets
from megatron_m1.data.tokenize.encode import EncodedBatch, Encoder
from megatron_m1.data.tokenize.encode_pool import encode_in_pool
from megatron_m1.data.tokenize.find import file_kind, find_inputs
from megatron_m1.data.tokenize.memory import check_text_files
from megatron_m1.data.tokenize.outputs import check_outputs, stale_notes, working_folder
from megatron_m1.data.tokenize.readers import read_batches
from megatron_m1.data.tokenize.report import TokenizeReport, reasons, report_of
from megatron_m1.data.tokenize.split import WHOLE, Split
from megatron_m1.data.tokenize.split_writer import Parts, SplitWriter
from megatron_m1.data.tokenizers import Tokenizer, load_tokenizer
from megatron_m1.files import file_lock
from megatron_m1.printing import counted


def tokenize_corpus(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    *,
    text_key: str | None = None,
    text_suffixes: Collection[str] = (),
    split: Split = WHOLE,
    buckets: LengthBuckets = NO_BUCKETS,
    chat: ChatOptions | None = None,
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
        text_key: key of a JSON object, or Parquet column, that holds the text, or the messages of a conversation;
            default: ``text``, or ``messages``.
        text_suffixes: of files that are text besides the usual ones, from ``find.text_suffix``.
        split: shares of training, validation and test, from ``split.parse_split``; the latter two get the prefixes
            ``<output_prefix>_validation`` and ``<output_prefix>_test``.
        buckets: from ``buckets.parse_length_buckets``: a corpus for each, ``<output_prefix>_up_to_<tokens>`` and
            ``<output_prefix>_over_<tokens>``, with the split's ends behind; of an empty one there are no files.
        chat: documents are conversations, rendered through a chat template; ``<output_prefix>.loss`` then says which
            tokens are the assistant's. None takes them for text, of which all is learnt.
        workers: processes that tokenise; 1 does it in this process; none takes one per usable core.
        append_eod: end each document with the tokenizer's eod; conversations end as their template has it.
        show_progress: draw a progress bar if stderr is a terminal.
        note: is told, line by line, what had to be assumed of the tokenizer.

    Raises:
        FileNotFoundError: an input or the tokenizer does not exist.
        ValueError: a truncated or unknown input file, a bad tokenizer or number of workers, a chat template that can't
            be used, no document left (in a part), another process is writing the same prefix, or what would be replaced
            is read or was not made by this function.
        RuntimeError: a worker process failed or was killed.
    """
    started = perf_counter()
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}; use at least 1")
    prefix, parts = str(output_prefix), Parts(split, buckets)
    prefixes = [prefix + suffix for suffix in parts.suffixes]
    found = find_inputs(inputs, text_suffixes)
    tokenizer = load_tokenizer(tokenizer_path)
    for each in prefixes:
        check_outputs(each, found.files, Path(tokenizer_path))
    key = text_key or ("text" if chat is None else MESSAGES_KEY)
    encoder = Encoder(Path(tokenizer_path), key, append_eod and chat is None, chat)
    described, chat_notes = _chat_facts(encoder, tokenizer, found.files, text_suffixes)
    for line in (*tokenizer.notes, *chat_notes, *stale_notes(prefix, prefixes)):
        note(line)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folders = [stack.enter_context(_sole_writer(each)) for each in prefixes]
        files = SplitWriter(folders, tokenizer, parts, append_eod=encoder.append_eod, masked=chat is not None)
        writer = stack.enter_context(files)
        # Conversations are encoded whole: what their template makes of a part is not known.
        cut = tokenizer.line_cut if chat is None else None
        if cut is None:
            check_text_files(found.files, text_suffixes)
        batches = read_batches(found.files, text_key=key, cut=cut, text_suffixes=text_suffixes)
        stack.enter_context(closing(batches))
        if workers == 1:
            encode = encoder.opened(tokenizer)
            encoded = ((batch.file_bytes, encode(batch)) for batch in batches)
        else:
            encoded = encode_in_pool(batches, encoder, workers=workers, folder=folders[0])
        _write_all(writer, stack.enter_context(closing(encoded)), found.files, show_progress)
        _check_any(writer, found.files, chat)
        writer.check_parts()
        writer.commit(prefix, described=described)
    return report_of(writer, prefix, parts, found.passed_over, perf_counter() - started)


def _chat_facts(
    encoder: Encoder, tokenizer: Tokenizer, files: Sequence[Path], text_suffixes: Collection[str]
) -> tuple[dict[str, object], tuple[str, ...]]:
    """What sidecars say of conversations, and what is to be noted."""
    chat = encoder.chat
    if chat is None:
        return {}, ()
    for file in files:
        if file_kind(file, text_suffixes) != "json":
            raise ValueError(f"{file} holds no conversations: --chat reads .jsonl, .json and .ndjson, one a line")
    # It imports a part of transformers, which only conversations need.
    from megatron_m1.data.chat.encode import open_chat

    template = open_chat(tokenizer, encoder.tokenizer_path, chat).template
    facts = {"template_sha256": template.digest, "max_length": chat.max_length, "too_long": chat.too_long}
    return {"chat": facts}, template.notes


def _write_all(
    writer: SplitWriter, encoded: Iterator[tuple[int, EncodedBatch]], files: Sequence[Path], show_progress: bool
) -> None:
    total_bytes = sum(file.stat().st_size for file in files)
    with _progress(total_bytes, show_progress) as progress:
        # A process that is killed could not show it again.
        progress.console.show_cursor(True)
        task = progress.add_task(f"tokenising {counted(len(files), 'file')}", total=total_bytes, documents=0)
        for file_bytes, result in encoded:
            writer.add(result)
            progress.update(task, advance=file_bytes, documents=writer.documents)


def _check_any(writer: SplitWriter, files: Sequence[Path], chat: ChatOptions | None) -> None:
    if writer.documents:
        return
    fix = "name its text with --text-key" if chat is None else "name its messages with --text-key"
    if chat is None and json.dumps(MESSAGES_KEY) in writer.keys:
        fix = "say --chat if it holds conversations"
    details = "".join(f"; the first {reason}: {detail}" for reason, detail in sorted(writer.details.items()))
    raise ValueError(
        f"{files[0]}{' and the other inputs have' if files[1:] else ' has'} no document that can be used "
        f"(skipped: {reasons(writer.skipped, writer.keys)}{details}): correct the input, or {fix}"
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
