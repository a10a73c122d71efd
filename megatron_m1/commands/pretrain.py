"""``megatron-m1 pretrain``: read, check, then train here or start the processes that do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_m1.commands.options import CommandParser, positive_integer
from megatron_m1.commands.resolved_plan import describe_plan, where_from
from megatron_m1.config import Config, ResolvedConfig
from megatron_m1.config.io import parse_config, tree_help
from megatron_m1.config.paths import path_option
from megatron_m1.config.resolve import resolve
from megatron_m1.launch import (
    Launch,
    count_gpus,
    ignore_requests_to_stop,
    launch_from_environment,
    prepare_worker,
    report_once,
    start_workers,
    worker_world_size,
)
from megatron_m1.printing import counted, folded, keep_output, terminal_columns

DESCRIPTION = """\
Train a model, or continue the run of --run.folder from its newest checkpoint.

Values come from the preset, then from the YAML file, then from the flags; the later win. Processes are started on this
node as NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE say, else as SLURM's variables say, else one per
GPU, else one. Under torchrun this command is a worker and starts none."""


def command_parser() -> CommandParser:
    """Return the parser of the options that are no part of the configuration."""
    parser = CommandParser(
        "pretrain", DESCRIPTION, "[--config FILE.yaml] [--preset NAME] [--GROUP.FIELD VALUE ...] [--dry-run]"
    )
    parser.add_argument(
        "--config",
        type=path_option,
        metavar="FILE.yaml",
        action="append",
        default=[],
        help="YAML of the groups below; ~ and $VARIABLES in its paths are expanded, as in those of flags",
    )
    parser.add_argument("--preset", metavar="NAME", help="model values to start from: tiny, m1-mid, m1-456b")
    parser.add_argument(
        "--init-from", metavar="WHAT", help="weights and model to start a new run from: hf:FOLDER, a checkpoint, a run"
    )
    parser.add_argument(
        "--nproc-per-node", type=positive_integer, metavar="N", help="processes to start on this node (GPUS_PER_NODE)"
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="same as --run.resume: continue from the newest complete checkpoint (default: yes)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check configuration, data and mesh, print the plan and start nothing"
    )
    parser.add_argument(
        "--world-size", type=positive_integer, metavar="N", help="with --dry-run: processes over all nodes of the plan"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="with --dry-run: kind of device of the plan (auto: what this machine has)",
    )
    return parser


def run(arguments: Sequence[str], *, default_processes: int = 1) -> int:
    """Run the command.

    Args:
        arguments: what follows ``pretrain``.
        default_processes: processes on this node when there are no GPUs and nothing else says.

    Raises:
        ValueError: wrong input, in one line.
    """
    parser = command_parser()
    if "--help" in arguments or "-h" in arguments:
        _print_help(parser)
        return 0
    workers = worker_world_size(os.environ)
    if workers is not None:
        prepare_worker()
    options, flags = parser.parse_known_args(arguments)
    if options.resume is not None:
        flags.append(f"--run.resume={str(options.resume).lower()}")
    if options.init_from is not None:
        flags += ["--run.init_from", options.init_from]
    names = parser.option_names()
    config = parse_config(options.config, flags, options.preset, command_options=names)
    init_from = config.run.init_from
    if init_from is not None:
        from megatron_m1.checkpoint.contents import check_shape
        from megatron_m1.convert.sources import initial_model

        model = initial_model(config)
        config = parse_config(options.config, flags, options.preset, command_options=names, model=model)
        fix = "leave that to the weights, or start from others"
        check_shape(config.model, model, Path(init_from), fix=fix)
    if not options.dry_run and (options.world_size is not None or options.device != "auto"):
        raise ValueError("--world-size and --device describe the machine of a plan: they need --dry-run")
    gpus = count_gpus()
    launch = None
    if workers is None and (options.world_size is None or not options.dry_run):
        launch = launch_from_environment(
            os.environ,
            processes=options.nproc_per_node,
            default_processes=gpus or default_processes,
            visible_gpus=gpus,
        )
    elif workers is not None and options.nproc_per_node is not None:
        raise ValueError("--nproc-per-node under torchrun: torchrun has started the processes, leave it out")
    if options.dry_run:
        return _dry_run(config, options, launch, gpus)
    keep_output()
    _check_gpus(gpus, launch)
    world_size = launch.world_size if launch else workers or 1
    config = _prepare(resolve(config, world_size, has_gpu=gpus > 0))
    if launch is not None and launch.world_size > 1:
        started = counted(launch.processes_per_node, "process", "processes")
        _say(f"starting {started} on this node; importing megatron-core takes seconds")
        return start_workers(launch, ["-m", "megatron_m1.cli", "pretrain", *without_launch_options(arguments)])
    return _train(config)


def _prepare(config: ResolvedConfig) -> ResolvedConfig:
    """Check the run folder and the data (the embedded corpus is built if it is missing) and return the final config."""
    from megatron_m1.training.preflight import build_embedded_corpus, check_data, check_folders

    check_folders(config)
    config = build_embedded_corpus(config, note=_say)
    notes = check_data(config).notes
    if os.environ.get("RANK", "0") == "0":
        for line in notes:
            _say(line)
    return config


def _say(line: str) -> None:
    print(line, flush=True)


def _train(config: ResolvedConfig) -> int:
    """Train in this process, show the summary on one rank; a failure that we know is one line."""
    from megatron_m1.checkpoint.store import CheckpointError
    from megatron_m1.convert.work import ConversionError
    from megatron_m1.runtime.watchdog import CollectiveError
    from megatron_m1.training.loop import pretrain
    from megatron_m1.training.steps_guard import NonFiniteError
    from megatron_m1.training.summary import show_summary

    try:
        summary = pretrain(config)
    except (CheckpointError, CollectiveError, ConversionError, NonFiniteError) as error:
        hung = isinstance(error, CollectiveError)
        # Ranks that wait for the same one give up at about the same time; it will never come.
        report_once(error, name_silent_ranks=hung, patience=5.0 if hung else 10.0)
        return 1
    if summary["interrupted"]:
        ignore_requests_to_stop()
    if os.environ.get("RANK", "0") == "0":
        show_summary(summary)
    return 0


def _check_gpus(gpus: int, launch: Launch | None) -> None:
    local = launch.processes_per_node if launch else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < local:
        raise ValueError(
            f"{local} processes on this node, but it has {counted(gpus, 'GPU')}: start at most {gpus} (GPUS_PER_NODE)"
        )


def without_launch_options(arguments: Sequence[str]) -> list[str]:
    """Drop ``--nproc-per-node``: the workers must not see it."""
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--nproc-per-node":
            rest.pop(0)
        elif not word.startswith("--nproc-per-node="):
            kept.append(word)
    return kept


def _dry_run(config: Config, options: argparse.Namespace, launch: Launch | None, gpus: int) -> int:
    on_gpu = gpus > 0 if options.device == "auto" else options.device == "gpu"
    world_size = options.world_size or (launch.world_size if launch else worker_world_size(os.environ) or 1)
    if options.world_size is None:
        _check_gpus(gpus, launch)
    config = resolve(config, world_size, has_gpu=on_gpu)
    source = "--world-size" if options.world_size else where_from(launch)
    lines = describe_plan(config, world_size, source=source, on_gpu=on_gpu)
    if os.environ.get("RANK", "0") == "0":
        columns = terminal_columns()
        # The words of a line stand in columns of their own.
        print("\n".join(part for line in lines for part in folded(line, columns, indent=12)))
    return 0


def _print_help(parser: CommandParser) -> None:
    parser.print_help()
    print("\nconfiguration (the defaults of model are those of the preset tiny; none means derived or off):\n")
    print(tree_help(parse_config([], [])))
