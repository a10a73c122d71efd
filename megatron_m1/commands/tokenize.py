"""``megatron-m1 tokenize``: from JSONL, text or Parquet to ``.bin``/``.idx``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from megatron_m1.commands.options import CommandParser, positive_integer
from megatron_m1.config.paths import input_option, path_option, text_option
from megatron_m1.data.chat.options import ChatOptions
from megatron_m1.data.tokenize.buckets import NO_BUCKETS, parse_length_buckets
from megatron_m1.data.tokenize.find import text_suffix
from megatron_m1.data.tokenize.split import WHOLE, parse_split
from megatron_m1.printing import keep_output

DESCRIPTION = """\
Turn documents into PREFIX.bin, .idx and .json. An earlier output stays until the new one is whole; files of these names
that this command did not make, or reads, are refused.

One document a line of .jsonl, .json and .ndjson, one a file of .txt, .text, .md and .rst (all of them plain, .gz or
.zst), one a row of .parquet. Folders are searched with their subfolders; hidden files, files of other kinds
and sidecars of tokenised corpora in them are passed over, counted and named.

With --split some documents are held out, into PREFIX_validation and PREFIX_test. Which ones is decided by their texts
alone: neither the number of processes nor the order of files matters, and equal texts are on one side. With --split
0.99,0.01, name PREFIX in data.train and PREFIX_validation in data.validation.

With --length-buckets 32768,131072 the same pass writes a corpus for each bucket: PREFIX_up_to_32768,
PREFIX_up_to_131072 and PREFIX_over_131072, each with its _validation and _test. An empty one is not written.

With --chat a line is a conversation: messages, and tools if there are any. The tokenizer's chat template, or that of
--chat-template, makes text of it, and PREFIX.loss says which tokens are the assistant's: the others are not learnt.
Its {% generation %} marks tell; a template without them is refused, but MiniMax-M1's is known. docs/fine_tuning.md"""


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
        "--text-key",
        metavar="KEY",
        help="JSON key or Parquet column of the text (default: text), with --chat of the messages (default: messages)",
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
        "--length-buckets",
        type=_option(parse_length_buckets),
        default=NO_BUCKETS,
        metavar="N[,N...]",
        help="a corpus for the documents of up to each number of tokens, and one for the longer ones",
    )
    _add_chat_options(parser)
    parser.add_argument(
        "--workers", type=positive_integer, metavar="N", help="processes (default: one per usable core)"
    )
    parser.add_argument("--no-eod", action="store_true", help="do not end documents with the tokenizer's end mark")
    return parser


def _add_chat_options(parser: CommandParser) -> None:
    parser.add_argument("--chat", action="store_true", help="documents are conversations, in JSON lines")
    parser.add_argument(
        "--chat-template",
        type=path_option,
        metavar="FILE",
        help="with --chat: a template with generation marks, instead of the tokenizer's",
    )
    parser.add_argument(
        "--max-length",
        type=positive_integer,
        metavar="N",
        help="with --chat: tokens of a document at most; --too-long says what becomes of longer ones (default: any)",
    )
    parser.add_argument(
        "--too-long",
        choices=["drop", "cut"],
        help="with --max-length: leave longer documents out, or cut their ends off",
    )


def _chat_options(options: argparse.Namespace) -> ChatOptions | None:
    """What was said of conversations; None takes documents for texts.

    Raises:
        ValueError: an option that needs another one, or excludes it.
    """
    if options.chat:
        if options.train_tokenizer is not None:
            raise ValueError(
                "--train-tokenizer learns from texts, not from conversations: train it without --chat first"
            )
        return ChatOptions(options.chat_template, options.max_length, options.too_long)
    for name in ("chat_template", "max_length", "too_long"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for conversations: say --chat as well, or leave it out")
    return None


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
    from megatron_m1.data.tokenize.split_writer import Parts
    from megatron_m1.data.tokenizers.train import check_new_model, train_tokenizer

    chat, parts = _chat_options(options), Parts(options.split, options.length_buckets)
    keep_output()
    try:
        if options.train_tokenizer is not None:
            # ``tokenize_corpus`` checks this as well, but only after training the tokenizer, which takes minutes.
            files = find_files(options.inputs, options.suffix)
            for suffix in parts.suffixes:
                check_outputs(options.output + suffix, files, options.tokenizer)
            check_new_model(options.tokenizer)
            print(f"training a SentencePiece tokenizer of {options.train_tokenizer:,} tokens", flush=True)
            train_tokenizer(
                options.inputs,
                options.tokenizer,
                vocab_size=options.train_tokenizer,
                text_key=options.text_key or "text",
                text_suffixes=options.suffix,
            )
        report = tokenize_corpus(
            options.inputs,
            options.output,
            options.tokenizer,
            text_key=options.text_key,
            text_suffixes=options.suffix,
            split=parts.split,
            buckets=parts.buckets,
            chat=chat,
            workers=options.workers,
            append_eod=not options.no_eod,
            note=lambda line: print(f"note: {line}", flush=True),
        )
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise ValueError(f"{place}{error.strerror or error}") from error
    print(report)
    return 0
