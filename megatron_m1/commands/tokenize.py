"""``megatron-m1 tokenize``: from JSONL, text or Parquet to ``.bin``/``.idx``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_m1.commands.options import CommandParser, positive_integer
from megatron_m1.config.paths import input_option, path_option, text_option
from megatron_m1.printing import keep_output

DESCRIPTION = """\
Turn documents into PREFIX.bin, .idx and .json. An earlier output stays until the new one is whole; files of these names
that this command did not make, or reads, are refused.

One document a line of .jsonl, .json and .ndjson, one a file of .txt, .text, .md and .rst (all of them plain, .gz or
.zst), one a row of .parquet. Folders are searched with their subfolders; hidden files, files of other kinds
and sidecars of tokenised corpora in them are passed over, counted and named."""


def command_parser() -> CommandParser:
    """Return the parser of the command's options."""
    parser = CommandParser(
        "tokenize",
        DESCRIPTION,
        "INPUT [INPUT ...] --tokenizer PATH --output PREFIX",
    )
    parser.add_argument("inputs", type=input_option, nargs="+", metavar="INPUT", help="file, folder or glob")
    parser.add_argument(
        "--output", type=text_option, required=True, metavar="PREFIX", help="path of the output without .bin"
    )
    parser.add_argument(
        "--tokenizer",
        type=path_option,
        required=True,
        metavar="PATH",
        help="SentencePiece .model or Hugging Face tokenizer folder",
    )
    parser.add_argument(
        "--train-tokenizer",
        type=positive_integer,
        metavar="N",
        help="first train a SentencePiece BPE model of N tokens on the inputs and write it to --tokenizer",
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="JSON key or Parquet column of the text (default: text)"
    )
    parser.add_argument(
        "--workers", type=positive_integer, metavar="N", help="processes (default: one per usable core)"
    )
    parser.add_argument("--no-eod", action="store_true", help="do not end documents with the tokenizer's end mark")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ValueError: wrong input, in one line.
    """
    options = command_parser().parse_all(arguments)
    from megatron_m1.data.tokenize import tokenize_corpus
    from megatron_m1.data.tokenize.find import find_files
    from megatron_m1.data.tokenize.outputs import check_outputs
    from megatron_m1.data.tokenizers.train import train_tokenizer

    keep_output()
    try:
        if options.train_tokenizer is not None:
            # ``tokenize_corpus`` checks this as well, but only after training the tokenizer, which takes minutes.
            check_outputs(options.output, find_files(options.inputs), options.tokenizer)
            print(f"training a SentencePiece tokenizer of {options.train_tokenizer:,} tokens", flush=True)
            train_tokenizer(
                options.inputs,
                options.tokenizer,
                vocab_size=options.train_tokenizer,
                text_key=options.text_key,
            )
        report = tokenize_corpus(
            options.inputs,
            options.output,
            options.tokenizer,
            text_key=options.text_key,
            workers=options.workers,
            append_eod=not options.no_eod,
            note=lambda line: print(f"note: {line}", flush=True),
        )
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise ValueError(f"{place}{error.strerror or error}") from error
    print(report)
    return 0
