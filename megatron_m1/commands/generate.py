"""``megatron-m1 generate``: continue prompts, to look at what was trained."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_m1.commands.options import CommandParser, token_count
from megatron_m1.config.paths import path_option


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
    from megatron_m1.convert.families.minimax_m1.config import DTYPES
    from megatron_m1.convert.sources import open_any, tokenizer_of
    from megatron_m1.data.tokenizers import load_tokenizer

    source = open_any(options.source)
    place = options.tokenizer or tokenizer_of(source)
    if not place:
        raise ValueError(f"{options.source} names no tokenizer: give --tokenizer")
    try:
        tokenizer = load_tokenizer(place)
    except OSError as error:
        raise ValueError(f"tokenizer {place} can't be read: {error.strerror or error}; give --tokenizer") from error
    for note in tokenizer.notes:
        print(f"note: {note}", file=sys.stderr)
    prompts = [tokenizer.encode(text) for text in options.prompt]

    from megatron_m1.generate.build import build_model
    from megatron_m1.generate.sampler import Sampling, generate
    from megatron_m1.runtime.mesh import shut_down

    sampling = Sampling(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        chunk_tokens=options.chunk_tokens,
        stop=tokenizer.eod,
    )
    sampling.check()
    stored = source.stored_dtype(source.units[0])
    model = build_model(source, DTYPES[options.precision] if options.precision else stored)
    try:
        ids: list[list[int]] = [[] for _ in prompts]
        for tokens in generate(model, prompts, sampling):
            for sequence, token in tokens.items():
                ids[sequence].append(token)
    finally:
        shut_down()
    for text, new in zip(options.prompt, ids, strict=True):
        print(f"{text}{tokenizer.decode(new)}" if len(prompts) == 1 else f"--- {text}\n{text}{tokenizer.decode(new)}")
    return 0
