"""``megatron-m1 pretrain``: read, check, then train here or start the processes that do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_m1.commands.launching import check_gpus, is_first_rank, without_launch_options
from megatron_m1.commands.options import CommandParser, positive_integer
from megatron_m1.commands.resolved_plan import describe_plan, where_from
from megatron_m1.config import Config, ResolvedConfig
from megatron_m1.config.help import tree_help
from megatron_m1.config.io import parse_config
from megatron_m1.config.paths import path_option
from megatron_m1.config.resolve import fitting_world, resolve_stages
from megatron_m1.config.schedules import Position, schedules_at
from megatron_m1.config.written import CONFIG
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
from megatron_m1.training.progress import stored_position
from megatron_m1.training.run_folder import own_configuration, saved_configuration

DESCRIPTION = """\
Train a model, or continue the run of --run.folder from its newest checkpoint.

Values come from the preset, then from the YAML file, then from the flags; the later win. With neither a preset nor a
file, a run that has checkpoints goes on with its own configuration and what the flags change in it.

Processes are started on this node as NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE say, else as
SLURM's variables say, else one per GPU, else one. Under torchrun this command is a worker and starts none."""


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
        "--init-from",
        metavar="WHAT",
        help="weights, model and (if data.tokenizer is empty) tokenizer to start a new run from: hf:FOLDER, which is a "
        "local Hugging Face folder, a checkpoint, or a run; nothing is downloaded",
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


def run(arguments: Sequence[str], *, default_processes: int = 1, default_config: Path | None = None) -> int:
    """Run the command.

    Args:
        arguments: what follows ``pretrain``.
        default_processes: processes on this node when there are no GPUs and nothing else says.
        default_config: YAML for a call that names none, nor the folder of a run that goes on.

    Raises:
        ValueError: wrong input, in one line.
    """
    parser = command_parser()
    if "--help" in arguments or "-h" in arguments:
        _print_help(parser, arguments)
        return 0
    workers = worker_world_size(os.environ)
    if workers is not None:
        prepare_worker()
    options, flags = parser.parse_known_args(arguments)
    if default_config is not None and not options.config and not _goes_on(options, flags):
        # In the words themselves: workers get them as well.
        arguments = ["--config", str(default_config), *arguments]
        options, flags = parser.parse_known_args(arguments)
    flags += _fields_of_options(options)
    config, notes = _configuration(options, flags, parser.option_names())
    if not options.dry_run and (options.world_size is not None or options.device != "auto"):
        raise ValueError("--world-size and --device describe the machine of a plan: they need --dry-run")
    gpus = count_gpus()
    at = stored_position(config)
    if notes:
        # A run that goes on with nothing else said.
        default_processes = fitting_world(default_processes, schedules_at(config, at).stage.config.parallel)
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
        return _dry_run(config, at, options, launch, gpus, notes)
    keep_output()
    check_gpus(gpus, launch)
    world_size = launch.world_size if launch else workers or 1
    stages = resolve_stages(config, world_size, has_gpu=gpus > 0, at=at)
    if _has_ended(stages[0]):
        return 0
    starts_workers = launch is not None and launch.world_size > 1
    # Workers of ours check again, and one of them says what was found.
    resolved = _prepare(stages, (lambda line: None) if starts_workers or not is_first_rank() else _say, notes)
    if launch is not None and starts_workers:
        started = counted(launch.processes_per_node, "process", "processes")
        _say(f"starting {started} on this node; importing megatron-core takes seconds")
        return start_workers(launch, ["-m", "megatron_m1.cli", "pretrain", *without_launch_options(arguments)])
    return _train(resolved)


def _fields_of_options(options: argparse.Namespace) -> list[str]:
    """Flags of the fields that have an option of their own, as far as it is given."""
    flags = []
    if options.resume is not None:
        flags.append(f"--run.resume={str(options.resume).lower()}")
    if options.init_from is not None:
        flags += ["--run.init_from", options.init_from]
    return flags


def _goes_on(options: argparse.Namespace, flags: Sequence[str]) -> bool:
    """Whether nothing but flags is given, and they name the folder of a run that can go on."""
    if options.preset is not None or not any(_names_folder(flag) for flag in flags):
        return False
    return own_configuration(Path(parse_config([], flags).run.folder)) is not None


def _names_folder(flag: str) -> bool:
    return flag.partition("=")[0] == "--run.folder"


def _configuration(options: argparse.Namespace, flags: Sequence[str], names: Sequence[str]) -> tuple[Config, list[str]]:
    """What was asked, and a line if that is what the run's folder has."""
    files, base = _files_and_base(options.config)
    given = parse_config(files, flags, options.preset, command_options=names, base=base)
    folder = Path(given.run.folder)
    own = own_configuration(folder) if not options.config and options.preset is None else None
    if own is not None:
        note = f"{folder} goes on with its own configuration, {folder / CONFIG}, and what the flags change in it"
        return parse_config([], flags, command_options=names, base=own), [note]
    alone = not options.config and options.preset is None and any(_names_folder(flag) for flag in flags)
    if alone and not (given.data.train or given.data.embedded_corpus):
        there = "has no run to go on with" if folder.exists() else "does not exist"
        raise ValueError(
            f"run.folder = {folder} {there}, and data.train is empty: correct the folder, or begin a run with --config "
            "or --data.train"
        )
    init_from = given.run.init_from
    if init_from is None:
        return given, []
    from megatron_m1.checkpoint.contents import check_shape
    from megatron_m1.convert.sources import initial_base

    initial = initial_base(given)
    # A file of a run leaves nothing to the weights.
    config = given if base else parse_config(files, flags, options.preset, command_options=names, base=initial)
    check_shape(config.model, initial.model, Path(init_from), fix="leave that to the weights, or start from others")
    return config, []


def _files_and_base(files: Sequence[Path]) -> tuple[Sequence[Path], Config | None]:
    """The last of the files that a run has written, which has every field, and those that come after it."""
    base: Config | None = None
    rest = files
    for at, file in enumerate(files):
        found = saved_configuration(file)
        if found is not None:
            base, rest = found, files[at + 1 :]
    return rest, base


def _has_ended(config: ResolvedConfig) -> bool:
    """Whether there is nothing to train, which is said; nothing is written then."""
    from megatron_m1.training.preflight import finished_at

    step = finished_at(config)
    if step is None:
        return False
    if is_first_rank():
        from megatron_m1.training.changes import nothing_to_train

        _say(nothing_to_train(step, config))
    return True


def _prepare(stages: Sequence[ResolvedConfig], note: Callable[[str], None], notes: Sequence[str]) -> ResolvedConfig:
    """Check the run folder and the data of all stages (the embedded corpus is built if it is missing).

    Returns:
        The final configuration of the first of them. ``note`` gets the ``notes`` and what else is worth a line.
    """
    from megatron_m1.training.preflight import build_embedded_corpus, check_data, check_folders, with_own_tokenizer
    from megatron_m1.training.stage_checks import check_epochs, check_later_stages

    check_folders(stages[0])
    for line in notes:
        note(line)
    config = with_own_tokenizer(build_embedded_corpus(stages[0], note=_say), note=note)
    later = [
        with_own_tokenizer(build_embedded_corpus(stage, note=_say), note=lambda line: None) for stage in stages[1:]
    ]
    found = [*check_data(config).notes, *check_later_stages([config, *later])]
    check_epochs(config)
    for line in found:
        note(line)
    return config


def _say(line: str) -> None:
    # A warning is prose. Other lines may have paths and commands, which can be copied only where nothing breaks them.
    parts = folded(line, terminal_columns(), indent=2) if line.startswith("warning: ") else [line]
    print("\n".join(parts), flush=True)


def _train(config: ResolvedConfig) -> int:
    """Train in this process, show the summary on one rank; a failure that we know is one line."""
    from megatron_m1.checkpoint.store import CheckpointError
    from megatron_m1.convert.work import ConversionError
    from megatron_m1.runtime.watchdog import CollectiveError
    from megatron_m1.training.loop import pretrain
    from megatron_m1.training.spike_guard import SpikeError
    from megatron_m1.training.steps_guard import NonFiniteError
    from megatron_m1.training.summary import show_summary, where_to_look

    try:
        summary = pretrain(config)
    except (CheckpointError, CollectiveError, ConversionError, NonFiniteError, SpikeError) as error:
        hung = isinstance(error, CollectiveError)
        # Ranks that wait for the same one give up at about the same time; it will never come.
        report_once(error, name_silent_ranks=hung, patience=5.0 if hung else 10.0)
        return 1
    if summary is None:
        return 0
    if summary["interrupted"]:
        ignore_requests_to_stop()
    if is_first_rank():
        show_summary(summary)
        print("\n".join(where_to_look(Path(config.run.folder))), flush=True)
    return 0


def _dry_run(
    config: Config,
    at: Position,
    options: argparse.Namespace,
    launch: Launch | None,
    gpus: int,
    notes: Sequence[str],
) -> int:
    on_gpu = gpus > 0 if options.device == "auto" else options.device == "gpu"
    world_size = options.world_size or (launch.world_size if launch else worker_world_size(os.environ) or 1)
    if options.world_size is None:
        check_gpus(gpus, launch)
    source = "--world-size" if options.world_size else where_from(launch)
    stages, columns = resolve_stages(config, world_size, has_gpu=on_gpu, at=at), terminal_columns()
    lines = describe_plan(stages, world_size, at=at, source=source, on_gpu=on_gpu, columns=columns)
    if is_first_rank():
        # The words of a line stand in columns of their own.
        print("\n".join(part for line in [*notes, *lines] for part in folded(line, columns, indent=12)))
    return 0


def _print_help(parser: CommandParser, arguments: Sequence[str]) -> None:
    """Explain the options, and the fields with what they are when nothing is given but the preset."""
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", nargs="?")
    base = parse_config([], [], chosen.parse_known_args(arguments)[0].preset)
    parser.print_help()
    print(
        f"\nconfiguration (defaults are those of the preset {base.preset}, of another one with --preset NAME --help; "
        "none means derived\nor off):\n"
    )
    print(tree_help(base))
