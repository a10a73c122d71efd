"""``megatron-m1 inspect``: parameter counts of a preset or a config, contents of a checkpoint or of a run folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_m1.checkpoint.contents import CheckpointContents, StoredTensor, complete_checkpoints, read_checkpoint
from megatron_m1.commands.options import CommandParser, positive_integer, split_flags
from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.fields import STAGES
from megatron_m1.config.io import parse_config
from megatron_m1.config.paths import path_option
from megatron_m1.config.resolve import check_model, resolve_split
from megatron_m1.config.written import config_text, tree_values
from megatron_m1.convert.places import CONFIG
from megatron_m1.library.load import parameter_counts
from megatron_m1.plan.parameters import NORMS, kind_parameters, layer_counts
from megatron_m1.plan.ranks import dense_axes, expert_axes, place, process_groups, spelled
from megatron_m1.printing import counted, folded, table, terminal_columns
from megatron_m1.shapes.registry import layer_mixers

DESCRIPTION = """\
Count the parameters of a preset or of a config, or show what a checkpoint or a run folder holds."""


def command_parser() -> CommandParser:
    """Return the parser of the command's options."""
    parser = CommandParser(
        "inspect",
        DESCRIPTION,
        "--preset NAME [--config FILE.yaml] [--GROUP.FIELD VALUE ...] [--mesh --world-size N] | "
        "CHECKPOINT_OR_RUN [--tensors]",
    )
    parser.add_argument(
        "folder",
        type=path_option,
        nargs="?",
        metavar="CHECKPOINT_OR_RUN",
        help="a checkpoint (RUN/checkpoints/step_<number>), or a run folder for its newest complete one",
    )
    parser.add_argument("--checkpoint", type=path_option, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--tensors", action="store_true", help="list every tensor of a checkpoint")
    parser.add_argument("--preset", metavar="NAME", help="tiny, m1-mid or m1-456b")
    parser.add_argument(
        "--config", type=path_option, metavar="FILE.yaml", action="append", default=[], help="configuration to count"
    )
    parser.add_argument(
        "--mesh", action="store_true", help="of a configuration: who is in which process group (with --world-size)"
    )
    parser.add_argument(
        "--world-size", type=positive_integer, metavar="N", help="with --mesh: processes over all nodes"
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ValueError: wrong input, or a damaged checkpoint, in one line.
    """
    parser = command_parser()
    # Dotted flags take a value, which would look like RUN_FOLDER: they are cut off first.
    own, flags = split_flags(arguments)
    options = parser.parse_all(own)
    described = options.preset is not None or bool(options.config) or bool(flags)
    if sum([options.folder is not None, options.checkpoint is not None, described]) != 1:
        parser.error("give one of --preset NAME (or --config FILE.yaml), CHECKPOINT_OR_RUN, --checkpoint FOLDER")
    if options.mesh != (options.world_size is not None) or (options.mesh and not described):
        parser.error("--mesh and --world-size N go together, with a configuration")
    if described:
        config = parse_config(options.config, flags, options.preset)
        check_model(config.model)
        lines = describe_mesh(config, options.world_size) if options.mesh else describe_model(config)
    elif options.checkpoint is not None:
        lines = describe_checkpoint(read_checkpoint(options.checkpoint), every_tensor=options.tensors)
    else:
        lines = describe_folder(options.folder, every_tensor=options.tensors)
    columns = terminal_columns()
    # A line of a table that fits stays as it is: it is laid out by the width as well.
    print("\n".join(part for line in lines for part in folded(line, columns, indent=2)))
    return 0


MOST_RANKS = 64
"""Of a mesh whose ranks are listed one by one."""


def describe_mesh(config: Config, world_size: int) -> list[str]:
    """Describe who is in which process group, line by line.

    Raises:
        ValueError: the mesh does not tile the world, or can't cut the model; one line.
    """
    parallel = resolve_split(config, world_size, has_gpu=False).parallel
    rows = [["group", "ranks", "groups", "the first", "the last", "share"]]
    for group in process_groups(parallel, world_size):
        first, last = spelled(group.members[0]), spelled(group.members[-1])
        rows.append([group.name, str(len(group.members[0])), str(len(group.members)), first, last, group.shares])
    lines = [
        "world = PP x DP x CP x TP = "
        + " x ".join(str(size) for _, size in reversed(dense_axes(parallel, world_size)))
        + " = PP x EDP x EP x ETP = "
        + " x ".join(str(size) for _, size in reversed(expert_axes(parallel, world_size)))
        + f" = {world_size:,}",
        "",
        *table(rows, terminal_columns(), left=[0, 3, 4, 5]),
    ]
    if world_size <= MOST_RANKS:
        grids = [dense_axes(parallel, world_size), expert_axes(parallel, world_size)[:-1]]
        names = [name for axes in grids for name, _ in axes]
        ranks = [["rank", *names]]
        for rank in range(world_size):
            ranks.append([str(rank), *(str(number) for axes in grids for number in place(rank, axes).values())])
        lines += ["", *table(ranks, terminal_columns())]
    return lines


def describe_model(config: Config) -> list[str]:
    """Describe a model by its parameters, line by line."""
    model = config.model
    found = parameter_counts(model)
    counts, active = found.all, found.active
    lines = [f"preset {config.preset}: {counted(model.num_layers, 'layer')}, hidden {model.hidden_size}", ""]
    rows = [["parameters", "all", "active per token"]]
    rows += [[group, f"{count:,}", f"{active[group]:,}"] for group, count in counts.groups.items()]
    rows += [
        ["total", f"{counts.total:,}", f"{active.total:,}"],
        ["less embedding, head", f"{counts.without_vocabulary:,}", f"{active.without_vocabulary:,}"],
    ]
    lines += [
        *table(rows, terminal_columns(), left=[0]),
        "",
        f"weights in bf16: {_gib(2 * counts.total)}, in fp32: {_gib(4 * counts.total)}",
        "",
        *_layer_table(model),
    ]
    return lines


def _layer_table(model: ModelConfig) -> list[str]:
    mixers, ffns = kind_parameters(model)
    mixing = {parameter.group for parameter in mixers}
    groups = list(dict.fromkeys(parameter.group for parameter in ffns))
    rows = [["layer", "attention", "attention", *groups, NORMS, "total"]]
    for index, (kind, counts) in enumerate(zip(layer_mixers(model), layer_counts(model), strict=True)):
        numbers = [sum(counts[group] for group in mixing), *(counts[group] for group in groups), counts[NORMS]]
        rows.append([f"{index}", kind, *(f"{number:,}" for number in (*numbers, counts.total))])
    return table(rows, terminal_columns(), left=[1])


def _gib(size: int) -> str:
    return f"{size:,} bytes ({size / 2**30:.2f} GiB)"


def describe_checkpoint(contents: CheckpointContents, *, every_tensor: bool = False) -> list[str]:
    """Describe a checkpoint, line by line.

    Args:
        contents: what it holds.
        every_tensor: list the tensors one by one, not only their number and bytes.

    Raises:
        ValueError: its configuration is of no possible model.
    """
    config, parallel = contents.config, contents.became.parallel
    check_model(config.model)
    tokenizer = contents.tokenizer
    return [
        f"checkpoint {contents.folder}",
        f"step {contents.step:,}, {counted(contents.tokens, 'token')}, {_gib(contents.bytes_on_disk)} on disk",
        f"preset {config.preset}, {parameter_counts(config).all.total:,} parameters, {contents.became.train.precision}",
        f"written by tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size}, "
        f"expert {parallel.expert_model_parallel_size} x expert tensor {parallel.expert_tensor_parallel_size}",
        *([f"tokenizer {tokenizer}" + ("" if tokenizer.exists() else ", which is not there")] if tokenizer else []),
        "config:",
        *(f"  {line}" for line in config_text(config).splitlines()),
        *_became_lines(contents),
        f"{counted(len(contents.tensors), 'tensor')}, {_gib(sum(t.size for t in contents.tensors))}"
        + (":" if every_tensor else " (--tensors lists them)"),
        *_tensor_lines(contents.tensors if every_tensor else ()),
    ]


def _became_lines(contents: CheckpointContents) -> list[str]:
    """What was left open in the configuration, and what that became where it ran."""
    asked, became = tree_values(contents.config), tree_values(contents.became)
    lines = [
        f"  {group}.{name} {value}"
        for group in asked.keys() - {"preset", STAGES}
        for name, value in became[group].items()
        if value != asked[group][name]
    ]
    return ["which became:", *sorted(lines)] if lines else []


def _tensor_lines(tensors: Sequence[StoredTensor]) -> list[str]:
    width = max([len(tensor.name) for tensor in tensors], default=0)
    return [f"  {t.name:<{width}}  {t.dtype:<9} {list(t.shape)}  {t.size:,} bytes" for t in tensors]


def describe_folder(folder: Path, *, every_tensor: bool = False) -> list[str]:
    """Describe a checkpoint, or a run folder by its newest complete one.

    Raises:
        ValueError: there is no such folder or no complete checkpoint in it, or that one is damaged.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}: give a checkpoint or a run folder")
    if re.fullmatch(r"step_\d+", folder.resolve().name):
        return describe_checkpoint(read_checkpoint(folder), every_tensor=every_tensor)
    checkpoints = complete_checkpoints(folder)
    if not checkpoints:
        if (folder / CONFIG).is_file():
            raise ValueError(
                f"{folder} is a Hugging Face folder, no checkpoint and no run: make a checkpoint of it with "
                f"megatron-m1 convert from-hf {folder} OUT, and inspect OUT"
            )
        raise ValueError(f"run folder {folder} has no complete checkpoint below {folder / 'checkpoints'}")
    names = ", ".join(checkpoint.name for checkpoint in reversed(checkpoints))
    return [f"run {folder}: {names}", *describe_checkpoint(read_checkpoint(checkpoints[0]), every_tensor=every_tensor)]
