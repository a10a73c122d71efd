"""``megatron-m1 plan``: memory, messages and time of a configuration, without data and without a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from megatron_m1.commands.options import CommandParser, positive_integer, split_flags
from megatron_m1.config import Config
from megatron_m1.config.io import parse_config
from megatron_m1.config.paths import path_option
from megatron_m1.config.resolve import resolve
from megatron_m1.config.schedules import DEFAULT_STEPS
from megatron_m1.config.stages import stages_of
from megatron_m1.plan.hardware import Hardware, load_hardware
from megatron_m1.plan.memory import PARTS
from megatron_m1.plan.outline import GIB, Outline, outline, recompute_choices, smallest_change, with_length
from megatron_m1.plan.ranks import dense_axes, expert_axes
from megatron_m1.printing import counted, folded, table, terminal_columns

DESCRIPTION = """\
Plan a configuration on GPUs that you need not have: memory of every pipeline stage, FLOPs, messages and the links that
they cross, and how long a step takes. Needs no data and no GPU, and says what it assumes. Ends with status 1 where the
plan does not fit."""

DOES_NOT_FIT = 1
"""Exit status of a plan that is complete, and whose memory no GPU has."""


def command_parser() -> CommandParser:
    """Return the parser of the command's options."""
    parser = CommandParser(
        "plan",
        DESCRIPTION,
        "[--config FILE.yaml] [--preset NAME] --gpus N --gpu NAME [--stage NAME] [--seq TOKENS] [--hardware FILE.yaml] "
        "[--json] [--GROUP.FIELD VALUE ...]",
    )
    parser.add_argument(
        "--config", type=path_option, metavar="FILE.yaml", action="append", default=[], help="configuration to plan"
    )
    parser.add_argument("--preset", metavar="NAME", help="tiny, m1-mid or m1-456b")
    parser.add_argument("--gpus", type=positive_integer, metavar="N", required=True, help="GPUs over all nodes")
    parser.add_argument("--gpu", metavar="NAME", required=True, help="h800, h100, h200, a100, b200 or one of your file")
    parser.add_argument(
        "--seq", type=positive_integer, metavar="TOKENS", help="tokens of a pack; a step keeps its tokens where it can"
    )
    parser.add_argument("--stage", metavar="NAME", help="of a recipe, the stage to plan, with the batch of its end")
    parser.add_argument("--hardware", type=path_option, metavar="FILE.yaml", help="your GPUs, and your assumptions")
    parser.add_argument("--json", action="store_true", help="all numbers, in bytes, FLOPs and seconds")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command: 0 if the plan fits, 1 if it does not.

    Raises:
        ValueError: wrong input, in one line.
    """
    own, flags = split_flags(arguments)
    options = command_parser().parse_all(own)
    hardware = load_hardware(options.hardware)
    gpu = hardware.find(options.gpu)
    asked = _of_stage(parse_config(options.config, flags, options.preset), options.stage)
    if options.seq is not None:
        asked = with_length(asked, options.seq, options.gpus)
    plan = outline(resolve(asked, options.gpus, has_gpu=True), options.gpus, gpu, hardware)
    change = None if plan.fits else smallest_change(asked, options.gpus, gpu, hardware)
    if options.json:
        print(json.dumps(plan.as_json() | {"smallest_change": change}, indent=2))
    else:
        columns = terminal_columns()
        lines = [
            *_head_lines(plan),
            "",
            *table(_memory_rows(plan), columns, left=[0]),
            "",
            *table(_choice_rows(plan), columns, left=[0]),
            "",
            *table(_flops_rows(plan), columns, left=[0]),
            "",
            *table(_traffic_rows(plan), columns, left=[0, 1]),
            "",
            *_time_lines(plan),
            "",
            *_assumption_lines(plan, hardware),
            *_verdict(plan, change),
        ]
        print("\n".join(part for line in lines for part in folded(line, columns, indent=2)))
    return 0 if plan.fits else DOES_NOT_FIT


def _of_stage(config: Config, name: str | None) -> Config:
    """What one stage of a recipe trains with, as a run of its own.

    Raises:
        ValueError: the configuration has no such stage, or has stages and none is named.
    """
    stages = {stage.name: stage for stage in stages_of(config)} if config.stages else {}
    if name is None and not stages:
        steps = DEFAULT_STEPS if config.train.max_steps is None else config.train.max_steps
        return replace(config, train=replace(config.train, max_steps=steps))
    if name not in stages:
        what = f"has the stages {', '.join(stages)}: plan one of them with --stage NAME" if stages else "has no stages"
        raise ValueError(f"the configuration {what}" + ("" if stages else ": leave --stage out"))
    stage = stages[name]
    packs = int((stage.config.train.global_batch_size_schedule or [0, stage.config.train.global_batch_size])[-1])
    batch = replace(stage.config.train, global_batch_size=packs, global_batch_size_schedule=[])
    alone = replace(stage.config, train=batch, stages=[])
    steps = max(1, round((stage.tokens or 0) / alone.tokens_per_step))
    return replace(alone, train=replace(batch, max_steps=steps))


def _head_lines(plan: Outline) -> list[str]:
    config, world = plan.config, plan.world_size
    grids = (dense_axes(config.parallel, world), expert_axes(config.parallel, world))
    mesh = ", ".join(" x ".join(f"{name} {size}" for name, size in reversed(axes)) for axes in grids)
    return [
        f"plan        preset {config.preset}, {config.train.precision}, {world:,} {plan.gpu.name}: {mesh}",
        f"step        {counted(config.train.global_batch_size, 'pack')} of {config.data.seq_length:,} tokens, "
        f"{plan.tokens:,} in all",
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _memory_rows(plan: Outline) -> list[list[str]]:
    rows = [["GiB of a rank", *(f"stage {rank}" for rank in range(len(plan.memory)))]]
    names = {"optimizer": "optimizer state", "states": "lightning states", "head": "head buffers"}
    names |= {"recomputed": "recomputed at a time", "working": "backward pass", "exchange": "exchange buffers"}
    for part in PARTS:
        rows.append([names.get(part, part), *(_gib(getattr(memory, part)) for memory in plan.memory)])
    rows.append(["all", *(_gib(memory.total) for memory in plan.memory)])
    under_way = ["+".join(map(str, memory.under_way)) for memory in plan.memory]
    return [*rows, ["micro-batches under way", *under_way]]


def _choice_rows(plan: Outline) -> list[list[str]]:
    choices = recompute_choices(plan.config, plan.world_size)
    return [
        ["fullest stage, recomputing", *choices],
        ["activations, GiB", *(_gib(memory.activations) for memory in choices.values())],
        ["all, GiB", *(_gib(memory.total) for memory in choices.values())],
    ]


def _flops_rows(plan: Outline) -> list[list[str]]:
    total = sum(plan.flops.values())
    rows = [["GFLOPs of a token", "forward and backward", "share"]]
    rows += [[part, f"{flops / 1e9:.3f}", f"{flops / total:.1%}"] for part, flops in plan.flops.items()]
    return [*rows, ["all", f"{total / 1e9:.3f}", ""]]


def _traffic_rows(plan: Outline) -> list[list[str]]:
    """Of the stage that sends most."""
    busiest = max(range(len(plan.traffic)), key=lambda rank: sum(t.nvlink + t.network for t in plan.traffic[rank]))
    rows = [[f"a step of stage {busiest}", "collective", "messages GiB", "NVLink GiB", "network GiB"]]
    rows += [[t.group, t.collective, _gib(t.size), _gib(t.nvlink), _gib(t.network)] for t in plan.traffic[busiest]]
    if not plan.traffic[busiest]:
        rows.append(["none", "", "", "", ""])
    return rows


def _time_lines(plan: Outline) -> list[str]:
    fast, slow = plan.fastest, plan.slowest
    ends = (fast, slow)

    def between(values: Sequence[float], form: str) -> str:
        low, high = sorted(values)
        return f"{low:{form}} to {high:{form}}"

    def part(name: str) -> str:
        return between([getattr(end, name) for end in ends], ".3g")

    rates = [plan.tokens / end.seconds for end in ends]
    mfu = between([plan.utilisation(end.seconds) for end in ends], ".1%")
    days = between([plan.days(end.seconds) for end in ends], ",.1f")
    return [
        f"step time   {part('seconds')} s: stage {slow.stage}, the busiest, computes {part('computing')}, exchanges "
        f"{part('exchanging')} and waits {part('waiting')}; gradients and parameters take {part('reducing')}",
        f"bubble      {between([end.waiting / end.seconds for end in ends], '.1%')} of the step",
        f"tokens      {between(rates, ',.0f')} a second, "
        f"{between([rate / plan.world_size for rate in rates], ',.0f')} a second and GPU",
        f"MFU         {mfu} of {plan.gpu.bf16_tflops:g} TFLOP/s",
        f"run         {plan.run_tokens:,} tokens in {counted(plan.config.train.max_steps, 'step')}: {days} days",
    ]


def _assumption_lines(plan: Outline, hardware: Hardware) -> list[str]:
    gpu = plan.gpu
    lines = [
        f"{gpu.name}: {gpu.memory_gib:g} GiB, NVLink {gpu.nvlink_gb_s:g} GB/s between {gpu.node} GPUs, network "
        f"{gpu.network_gb_s:g} GB/s a GPU; FP32 {gpu.fp32_tflops:g} TFLOP/s. {gpu.source}",
        "memory: packs of one document, balanced experts; parameters, gradients and optimizer state are exact, what is "
        "kept on a GPU follows from what its kernels save, and was not measured on one",
        "messages: counted as the process groups carry them on CPUs; rings share what comes from other nodes",
        "time: a model of throughput, without latencies, slow GPUs, data, checkpoints and validation; not calibrated",
    ]
    lines += [f"{name} {a.low:g} to {a.high:g}: {a.why}" for name, a in hardware.assumptions.items()]
    return [f"{'assumed' if not at else '':<12}{line}" for at, line in enumerate(lines)]


def _verdict(plan: Outline, change: str | None) -> list[str]:
    if plan.fits:
        needs = plan.memory[plan.fullest].total
        return ["", f"fits: stage {plan.fullest} needs {needs / GIB:.1f} GiB of {plan.usable / GIB:.1f}"]
    fix = (
        f"smallest change that fits: {change}"
        if change
        else "no choice of recomputation, size of the mesh or both of them fits: take more GPUs"
    )
    return ["", f"{plan.refusal()}; {fix}"]
