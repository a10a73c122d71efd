"""``megatron-m1 tokenize``: from JSONL, text or Parquet to ``.bin``/``.idx``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from megatron_m1.commands.options import CommandParser, positive_integer
from megatron_m1.config.paths import input_option, path_option, text_option
from megatron_m1.data.tokenize.find import text_suffix
from megatron_m1.data.tokenize.split import SUFFIXES, WHOLE, parse_split
from megatron_m1.printing import keep_output

DESCRIPTION = """\
Turn documents into PREFIX.bin, .idx and .json. An earlier output stays until the new one is whole; files of these names
that this command did not make, or reads, are refused.

One document a line of .jsonl, .json and .ndjson, one a file of .txt, .text, .md and .rst (all of them plain, .gz or
.zst), one a row of .parquet. Folders are searched with their subfolders; hidden files, files of other kinds
and sidecars of tokenised corpora in them are passed over, counted and named.

With --split some documents are held out, into PREFIX_validation and PREFIX_test. Which ones is decided by their texts
alone: neither the number of processes nor the order of files matters, and equal texts are on one side. With --split
0.99,0.01, name PREFIX in data.train and PREFIX_validation in data.validation."""


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
        "--suffix",
        type=_option(text_suffix),
        action="append",
        default=[],
        metavar=".EXT",
        help="take files of this suffix (.py, .py.gz) as text as well; repeatable",
    )
    parser.add_argument(
        "--split",
        type=_option(parse_split),
        default=WHOLE,
        metavar="A,B[,C]",
        help="shares of training, validation and test: 0.99,0.01 or 969,30,1 (default: all is for training)",
    )
    parser.add_argument(
        "--workers", type=positive_integer, metavar="N", help="processes (default: one per usable core)"
    )
    parser.add_argument("--no-eod", action="store_true", help="do not end documents with the tokenizer's end mark")
    return parser


def _option[T](read: Callable[[str], T]) -> Callable[[str], T]:
    """Let argparse show what ``read`` says of a bad value, after the option's name."""

    def converted(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ValueError: wrong input, in one line.
    """
    options = command_parser().parse_all(arguments)
    from megatron_m1.data.tokenize import tokenize_corpus
    from megatron_m1.data.tokenize.find import find_files
    from megatron_m1.data.tokenize.outputs import check_outputs
    from megatron_m1.data.tokenizers.train import check_new_model, train_tokenizer

    keep_output()
    try:
        if options.train_tokenizer is not None:
            # ``tokenize_corpus`` checks this as well, but only after training the tokenizer, which takes minutes.
            files = find_files(options.inputs, options.suffix)
            for part in options.split.parts:
                check_outputs(options.output + SUFFIXES[part], files, options.tokenizer)
            check_new_model(options.tokenizer)
            print(f"training a SentencePiece tokenizer of {options.train_tokenizer:,} tokens", flush=True)
            train_tokenizer(
                options.inputs,
                options.tokenizer,
                vocab_size=options.train_tokenizer,
                text_key=options.text_key,
                text_suffixes=options.suffix,
            )
        report = tokenize_corpus(
            options.inputs,
            options.output,
            options.tokenizer,
            text_key=options.text_key,
            text_suffixes=options.suffix,
            split=options.split,
            workers=options.workers,
            append_eod=not options.no_eod,
            note=lambda line: print(f"note: {line}", flush=True),
        )
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise ValueError(f"{place}{error.strerror or error}") from error
    print(report)
    return 0
