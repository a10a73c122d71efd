"""``megatron-m1 convert``: between our checkpoints and Hugging Face folders."""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_m1.commands.options import CommandParser, positive_integer
from megatron_m1.config.fields import nearest
from megatron_m1.config.paths import path_option
from megatron_m1.convert.licences import licence_id
from megatron_m1.convert.places import check_hub_folder, check_remote_code, find_checkpoint
from megatron_m1.convert.sizes import parse_size
from megatron_m1.convert.work import ConversionError, refuse_existing, started_ranks
from megatron_m1.launch import report_once
from megatron_m1.printing import keep_output

DIRECTIONS = {
    "to-hf": "CHECKPOINT_OR_RUN OUT",
    "from-hf": "HF_FOLDER OUT",
}
EXAMPLES = {
    "to-hf": "megatron-m1 convert to-hf runs/mid hf/mid",
    "from-hf": "megatron-m1 convert from-hf MiniMax-M1-80k imported",
}
OVERVIEW = f"""\
usage: megatron-m1 convert to-hf|from-hf SOURCE OUT [options]

  {EXAMPLES["to-hf"]:<54}a run or a checkpoint becomes a Hugging Face folder
  {EXAMPLES["from-hf"]:<54}a Hugging Face folder becomes a checkpoint
"""
SHARD_SIZES = {"to-hf": "1GB", "from-hf": "500MB"}
"""Files are synced and hashed while the next ones are written."""
DESCRIPTION = """\
to-hf writes safetensors, their index, config.json, generation_config.json, the tokenizer, the licence files that came
with the model, and a model card, README.md. from-hf reads a local folder, downloads nothing, and writes a folder like a
run's, whose checkpoint any mesh reads. OUT must not exist; until it is whole it is OUT.partial, where the same command
goes on after a kill. Under torchrun the processes share the work. Status 2 is wrong input; 1 is a disk that refuses, or
data that turn out to be damaged on the way."""


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
        parser.add_argument(
            "--license",
            type=licence_id,
            metavar="ID",
            help="the hub's identifier for the card's license field, such as apache-2.0 (default: other if the model "
            "came with licence files, else unknown)",
        )
    else:
        _add_resizing(parser)
    return parser


def _add_resizing(parser: CommandParser) -> None:
    parser.add_argument(
        "--resize-vocab",
        type=positive_integer,
        metavar="N",
        help="rows of embedding and head, for a longer tokenizer; old rows stay bit for bit, none is dropped",
    )
    parser.add_argument(
        "--resize-multiple",
        type=positive_integer,
        metavar="M",
        help="round N up to a multiple of M: Megatron-LM takes 128 x the tensor-parallel size (default: 1, N as it is)",
    )
    parser.add_argument(
        "--resize-init",
        choices=("mean", "normal", "zeros"),
        help="new rows: all the mean of the old ones (default), drawn around it with the old rows' standard deviation "
        "in each column, or zeros",
    )


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ValueError: wrong input, in one line.
    """
    if not arguments:
        raise ValueError(f"convert needs a direction: {_directions()}")
    if arguments[0] in ("-h", "--help"):
        print(OVERVIEW)
        for direction in DIRECTIONS:
            command_parser(direction).print_help()
            print()
        return 0
    direction = arguments[0]
    if direction not in DIRECTIONS:
        close = nearest(direction, list(DIRECTIONS))
        fix = f"did you mean {close}?" if close else _directions()
        raise ValueError(f"unknown direction {direction}: {fix}")
    options = command_parser(direction).parse_all(arguments[1:])
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


def _directions() -> str:
    return f"{EXAMPLES['to-hf']} writes a Hugging Face folder, {EXAMPLES['from-hf']} reads one"


def _check_out(options: argparse.Namespace) -> None:
    """Look at OUT before anything heavy; of several ranks that don't see the same, the first tells the others later."""
    if options.dry_run or "RANK" not in os.environ:
        refuse_existing(options.out)


def _to_hf(options: argparse.Namespace) -> list[str]:
    shard_size = parse_size(options.shard_size)
    checkpoint = find_checkpoint(options.source)
    if options.tokenizer is not None and not options.tokenizer.exists():
        raise ValueError(f"tokenizer {options.tokenizer} can't be read: {os.strerror(errno.ENOENT)}")
    if options.remote_code is not None:
        check_remote_code(options.remote_code, options.format)
    _check_out(options)

    from megatron_m1.convert.export import ExportOptions, check_inputs, describe_export, export
    from megatron_m1.convert.families.minimax_m1.config import DTYPES, caveats
    from megatron_m1.convert.our_checkpoint import open_checkpoint
    from megatron_m1.convert.sources import tokenizer_of

    source = open_checkpoint(checkpoint)
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
        shard_size=shard_size,
        format=options.format,
        tokenizer=tokenizer,
        max_positions=options.max_positions,
        remote_code=options.remote_code,
        verify=options.verify,
        licence=options.license,
    )
    plan = describe_export(source, choices)
    notes += caveats(source.model, native=options.format == "native")
    if options.dry_run:
        ready = check_inputs(source, choices)
        notes += [] if ready is None else ready.notes
        return [f"would write {plan}", *(f"note: {note}" for note in notes)]
    with started_ranks() as ranks:
        notes += export(source, options.out, choices, ranks)
    return [f"{options.out}: {plan}", *(f"note: {note}" for note in notes)]


def _from_hf(options: argparse.Namespace) -> list[str]:
    if options.resize_vocab is None and (options.resize_multiple or options.resize_init):
        raise ValueError("--resize-multiple and --resize-init say how --resize-vocab N does it: give that too")
    shard_size = parse_size(options.shard_size)
    check_hub_folder(options.source)
    _check_out(options)

    from megatron_m1.convert.families.minimax_m1.config import DTYPES, unread
    from megatron_m1.convert.hub_folder import open_hub_folder
    from megatron_m1.convert.load_hf import LoadOptions, load_hf
    from megatron_m1.convert.resize import Resize, resize_notes, resized
    from megatron_m1.convert.tokenizer import check_rows, left_behind, token_count

    resize = None
    if options.resize_vocab is not None:
        resize = Resize(options.resize_vocab, options.resize_multiple or 1, options.resize_init or "mean")
    choices = LoadOptions(dtype=DTYPES.get(options.dtype), shard_size=shard_size, verify=options.verify, resize=resize)
    has_weights = not options.dry_run or any(options.source.glob("*.safetensors"))
    source = open_hub_folder(options.source, headers=has_weights)
    rows = source.model.vocab_size
    lines = resize_notes(resize, rows) if resize else []
    check_rows(token_count(options.source) or 0, resize.rows_for(rows) if resize else rows, options.source)
    notes = [f"note: {note}" for note in (*lines, *unread(source.config), *left_behind(options.source))]
    if options.dry_run:
        source = resized(source, resize) if resize else source
        dtype = choices.dtype or source.dtype
        size = source.bytes_as(choices.dtype)
        return [f"would write {len(source.files):,} tensors, {size:,} bytes of weights, {str(dtype)[6:]}", *notes]
    with started_ranks() as ranks:
        checkpoint = load_hf(source, options.out, choices, ranks)
    return [f"{checkpoint}: {len(source.files):,} tensors of {options.source}", *notes]
