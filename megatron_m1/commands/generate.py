"""``megatron-m1 generate``: continue prompts, to look at what was trained."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_m1.commands.options import CommandParser, token_count
from megatron_m1.config.paths import path_option
from megatron_m1.generate.sampling import Sampling
from megatron_m1.library.load import load
from megatron_m1.library.places import find_place, find_tokenizer


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def command_parser() -> CommandParser:
    """Return the parser of the command's options."""
    parser = CommandParser(
        "generate",
        "Continue prompts with one process, exactly as the model was trained: no token is dropped or padded.",
        "CHECKPOINT_OR_RUN_OR_HF_FOLDER --prompt TEXT [--prompt TEXT ...]",
    )
    parser.add_argument("source", type=path_option, metavar="CHECKPOINT_OR_RUN_OR_HF_FOLDER")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="text to continue; repeatable")
    parser.add_argument("--max-tokens", type=token_count, default=64, metavar="N", help="new tokens (default: 64)")
    parser.add_argument("--temperature", type=_number, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=_number, default=1.0, metavar="P", help="share of probability to draw from")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of the draws")
    parser.add_argument("--chunk-tokens", type=token_count, default=2048, metavar="N", help="prompt tokens of a pass")
    parser.add_argument(
        "--tokenizer",
        type=path_option,
        metavar="PATH",
        help="default: the folder's own, or the checkpoint's data.tokenizer",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="parameters and products (default: as the weights are stored)"
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ValueError: wrong input, in one line.
    """
    options = command_parser().parse_all(arguments)
    for text in options.prompt:
        try:
            text.encode()
        except UnicodeEncodeError:
            # Python turns bytes of the command line that are no UTF-8 into lone surrogates, which no tokenizer takes
            # and which could not be printed before the answer either.
            raise ValueError(f"prompt {text!r} is not UTF-8: give it in this encoding") from None
    numbers = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_p", "seed", "chunk_tokens")}
    Sampling(**numbers).check()
    tokenizer = find_tokenizer(find_place(options.source), options.tokenizer, fix="give --tokenizer")
    if isinstance(tokenizer, str):
        raise ValueError(tokenizer)
    for note in tokenizer.notes:
        print(f"note: {note}", file=sys.stderr)
    prompts = [tokenizer.encode(text) for text in options.prompt]
    if not all(prompts):
        raise ValueError(f"prompt {options.prompt[prompts.index([])]!r} has no token: give some text")
    model = load(options.source, dtype=options.precision, tokenizer=tokenizer)
    texts = [generation.text for generation in model.generate(prompts, **numbers)]
    for prompt, text in zip(options.prompt, texts, strict=True):
        print(f"{prompt}{text}" if len(prompts) == 1 else f"--- {prompt}\n{prompt}{text}")
    return 0
