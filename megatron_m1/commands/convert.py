"""``megatron-m1 convert``: between our checkpoints and Hugging Face folders."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_m1.commands.options import CommandParser, positive_integer
from megatron_m1.config.io import unknown
from megatron_m1.config.paths import path_option
from megatron_m1.launch import report_once
from megatron_m1.printing import keep_output

DIRECTIONS = {
    "to-hf": "CHECKPOINT_OR_RUN OUT",
    "from-hf": "HF_FOLDER OUT",
}
SHARD_SIZES = {"to-hf": "1GB", "from-hf": "500MB"}
"""Files are synced and hashed while the next ones are written."""
DESCRIPTION = """\
to-hf writes safetensors, their index, config.json, generation_config.json and the tokenizer. from-hf writes a folder
like a run's, whose checkpoint any mesh reads. OUT must not exist; until it is whole it is OUT.partial, where the same
command goes on after a kill. Under torchrun the processes share the work. Status 2 is wrong input; 1 is a disk that
refuses, or data that turn out to be damaged on the way."""


def command_parser(direction: str) -> CommandParser:
    """Return the parser of one direction's options."""
    parser = CommandParser(f"convert {direction}", DESCRIPTION, f"{DIRECTIONS[direction]} [options]")
    parser.add_argument("source", type=path_option, metavar=DIRECTIONS[direction].split()[0])
    parser.add_argument("out", type=path_option, metavar="OUT")
    parser.add_argument(
        "--dtype",
        choices=("keep", "fp32", "bf16", "fp16"),
        default="keep",
        help="of all weights but the router's, which stays fp32 (default: keep each as it is stored)",
    )
    size = SHARD_SIZES[direction]
    parser.add_argument(
        "--shard-size", default=size, metavar="SIZE", help=f"bytes of tensors in a file, at most (default: {size})"
    )
    parser.add_argument("--verify", action="store_true", help="read the result again and compare it bit by bit")
    parser.add_argument("--dry-run", action="store_true", help="check names and shapes, say what would be written")
    if direction == "to-hf":
        parser.add_argument(
            "--format",
            choices=("hub", "native"),
            default="hub",
            help="hub: for the hub's code and vLLM up to 0.23.0; native: exact in transformers, as it saves itself",
        )
        parser.add_argument(
            "--tokenizer",
            type=path_option,
            metavar="PATH",
            help="SentencePiece .model or folder (default: data.tokenizer)",
        )
        parser.add_argument("--no-tokenizer", action="store_true", help="write none")
        parser.add_argument(
            "--remote-code", type=path_option, metavar="FOLDER", help="has the hub's modeling files, for auto_map"
        )
        parser.add_argument(
            "--max-positions",
            type=positive_integer,
            metavar="N",
            help="max_position_embeddings (default: the model's, or data.seq_length if that is more)",
        )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ValueError: wrong input, in one line.
    """
    if not arguments:
        raise ValueError(f"convert needs a direction: {' or '.join(DIRECTIONS)}")
    if arguments[0] in ("-h", "--help"):
        for direction in DIRECTIONS:
            command_parser(direction).print_help()
        return 0
    direction = arguments[0]
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, list(DIRECTIONS))
    options = command_parser(direction).parse_all(arguments[1:])
    from megatron_m1.convert.work import ConversionError

    if not options.dry_run:
        keep_output()
    try:
        lines = _to_hf(options) if direction == "to-hf" else _from_hf(options)
    except ConversionError as error:
        report_once(error)
        return 1
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))
    return 0


def _to_hf(options: argparse.Namespace) -> list[str]:
    from megatron_m1.convert.export import ExportOptions, check_inputs, describe_export, export
    from megatron_m1.convert.families.minimax_m1.config import DTYPES, caveats
    from megatron_m1.convert.our_checkpoint import open_checkpoint
    from megatron_m1.convert.sources import find_checkpoint, tokenizer_of
    from megatron_m1.convert.work import parse_size, refuse_existing, started_ranks

    source = open_checkpoint(find_checkpoint(options.source))
    tokenizer: Path | None = options.tokenizer
    notes = []
    if options.no_tokenizer:
        tokenizer = None
    elif tokenizer is None:
        tokenizer = tokenizer_of(source)
        if tokenizer is None:
            notes = ["no tokenizer was written: the checkpoint names none; give --tokenizer"]
        elif not tokenizer.exists():
            raise ValueError(
                f"data.tokenizer of the checkpoint, {tokenizer}, is not there: give --tokenizer PATH or --no-tokenizer"
            )
    choices = ExportOptions(
        dtype=DTYPES.get(options.dtype),
        shard_size=parse_size(options.shard_size),
        format=options.format,
        tokenizer=tokenizer,
        max_positions=options.max_positions,
        remote_code=options.remote_code,
        verify=options.verify,
    )
    plan = describe_export(source, choices)
    notes += caveats(source.model, native=options.format == "native")
    if options.dry_run:
        refuse_existing(options.out)
        ready = check_inputs(source, choices)
        notes += [] if ready is None else ready.notes
        return [f"would write {plan}", *(f"note: {note}" for note in notes)]
    with started_ranks() as ranks:
        notes += export(source, options.out, choices, ranks)
    return [f"{options.out}: {plan}", *(f"note: {note}" for note in notes)]


def _from_hf(options: argparse.Namespace) -> list[str]:
    from megatron_m1.convert.families.minimax_m1.config import DTYPES, unread
    from megatron_m1.convert.hub_folder import open_hub_folder
    from megatron_m1.convert.load_hf import LoadOptions, load_hf
    from megatron_m1.convert.tokenizer import left_behind
    from megatron_m1.convert.work import parse_size, refuse_existing, started_ranks

    choices = LoadOptions(
        dtype=DTYPES.get(options.dtype), shard_size=parse_size(options.shard_size), verify=options.verify
    )
    if options.dry_run:
        refuse_existing(options.out)
        source = open_hub_folder(options.source, headers=any(options.source.glob("*.safetensors")))
        dtype = choices.dtype or source.dtype
        size = source.bytes_as(choices.dtype)
        notes = [f"note: {note}" for note in (*unread(source.config), *left_behind(options.source))]
        return [f"would write {len(source.files):,} tensors, {size:,} bytes of weights, {str(dtype)[6:]}", *notes]
    source = open_hub_folder(options.source)
    notes = [f"note: {note}" for note in (*unread(source.config), *left_behind(options.source))]
    with started_ranks() as ranks:
        checkpoint = load_hf(source, options.out, choices, ranks)
    return [f"{checkpoint}: {len(source.files):,} tensors of {options.source}", *notes]
