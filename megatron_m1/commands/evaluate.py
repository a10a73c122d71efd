"""``megatron-m1 evaluate``: perplexity, needles and tasks of a checkpoint, here or in processes that are started."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_m1.commands.launching import check_gpus, without_launch_options
from megatron_m1.commands.options import CommandParser, positive_integer
from megatron_m1.config.paths import path_option
from megatron_m1.config.resolve import fitting_world
from megatron_m1.evaluation.plan import (
    FIELDS,
    Evaluation,
    NeedlePlan,
    Target,
    TasksPlan,
    check_corpora,
    check_lengths,
    find_target,
    settle,
)
from megatron_m1.launch import (
    count_gpus,
    launch_from_environment,
    prepare_worker,
    report_once,
    start_workers,
    worker_world_size,
)
from megatron_m1.printing import counted, keep_output, terminal_columns

LISTED = "\n  ".join(textwrap.wrap(", ".join(FIELDS), 100, break_on_hyphens=False))
DESCRIPTION = f"""\
Evaluate a run's newest checkpoint, a checkpoint or a Hugging Face folder, on any mesh, without an optimizer.

Without --needle and --tasks: perplexity of the validation packs, by position and by source. What is found is printed
and written to RUN/evaluation/CHECKPOINT/ as JSON and PNG. Processes are started as pretrain starts them, on the
checkpoint's own mesh unless --parallel.* gives another.

Besides --parallel.*, these fields may be given as flags (--data.seq_length 32768):
  {LISTED}"""


def command_parser() -> CommandParser:
    """Return the parser of the command's own options."""
    parser = CommandParser(
        "evaluate",
        DESCRIPTION,
        "SOURCE [--perplexity] [--needle LENGTH,...] [--tasks NAME,...] [--GROUP.FIELD VALUE ...]",
    )
    parser.add_argument(
        "source", type=path_option, metavar="SOURCE", help="a run, a checkpoint or a Hugging Face folder"
    )
    parser.add_argument(
        "--data",
        metavar="BLEND",
        help="corpora to evaluate on, and to make haystacks of: a prefix, or a list as of data.validation (default: "
        "the run's validation data)",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the checkpoint's or the folder's own")
    parser.add_argument("--output", type=path_option, metavar="FOLDER", help="of the results")
    parser.add_argument(
        "--nproc-per-node", type=positive_integer, metavar="N", help="processes to start on this node (GPUS_PER_NODE)"
    )
    perplexity = parser.add_argument_group("perplexity")
    perplexity.add_argument("--perplexity", action="store_true", help="also beside --needle and --tasks")
    perplexity.add_argument(
        "--packs", type=positive_integer, metavar="N", help="packs of the blend (default: the run's eval_samples)"
    )
    needle = parser.add_argument_group("needle retrieval")
    needle.add_argument(
        "--needle", type=_integers, metavar="LENGTH,...", help="hide sentences in packs of these numbers of tokens"
    )
    needle.add_argument(
        "--depths", type=_shares, metavar="SHARE,...", help="where: 0 the start, 1 the end (default: 0,0.25,0.5,0.75,1)"
    )
    needle.add_argument("--samples", type=positive_integer, metavar="N", help="of a length and depth (default: 4)")
    needle.add_argument("--seed", type=int, metavar="N", help="of needles and haystacks (default: 1234)")
    needle.add_argument(
        "--needle-sentence", metavar="TEXT", help=f"with {{key}} and {{value}} (default: {NeedlePlan(()).sentence!r})"
    )
    tasks = parser.add_argument_group("tasks of lm-eval (pip install 'megatron-m1[eval]')")
    tasks.add_argument("--tasks", type=_names, metavar="NAME,...", help="tasks or groups of them")
    tasks.add_argument(
        "--include-path", type=path_option, metavar="FOLDER", help="of further task files; their code runs"
    )
    tasks.add_argument("--num-fewshot", type=_count, metavar="N", help="examples in the prompt (default: the task's)")
    tasks.add_argument("--limit", type=positive_integer, metavar="N", help="only the first questions of each task")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ValueError: wrong input, in one line.
    """
    parser = command_parser()
    workers = worker_world_size(os.environ)
    if workers is not None:
        prepare_worker()
    options, flags = parser.parse_known_args(arguments)
    _check_options(options)
    for field, value in (("data.validation", options.data), ("data.tokenizer", options.tokenizer)):
        flags += [f"--{field}", value] if value is not None else []
    target = find_target(options.source, flags, options=parser.option_names(), output=options.output)
    gpus, launch = count_gpus(), None
    if workers is None:
        launch = launch_from_environment(
            os.environ,
            processes=options.nproc_per_node,
            default_processes=fitting_world(gpus or 1, target.config.parallel),
            visible_gpus=gpus,
        )
    elif options.nproc_per_node is not None:
        raise ValueError("--nproc-per-node under torchrun: torchrun has started the processes, leave it out")
    check_gpus(gpus, launch)
    evaluation = _evaluation(options, target, launch.world_size if launch else workers or 1, has_gpu=gpus > 0)
    is_started = workers is not None and workers > 1
    _check(evaluation, target, is_started=is_started)
    for note in () if is_started else target.tokenizer.notes:
        print(f"note: {note}", file=sys.stderr)
    keep_output()
    if launch is not None and launch.world_size > 1:
        started = counted(launch.processes_per_node, "process", "processes")
        print(f"starting {started} on this node; importing megatron-core takes seconds", flush=True)
        return start_workers(launch, ["-m", "megatron_m1.cli", "evaluate", *without_launch_options(arguments)])
    return _evaluate(evaluation)


def _check_options(options: argparse.Namespace) -> None:
    """Check that no option is given to what is not evaluated."""
    needs = {
        "needle": ("depths", "samples", "seed", "needle_sentence"),
        "tasks": ("include_path", "num_fewshot", "limit"),
    }
    for switch, names in needs.items():
        for name in names:
            if getattr(options, name) is not None and getattr(options, switch) is None:
                raise ValueError(f"--{name.replace('_', '-')} is for --{switch}, which is not given: give it as well")
    if options.packs is not None and not _wants_perplexity(options):
        raise ValueError("--packs is for the perplexity: give --perplexity as well")


def _wants_perplexity(options: argparse.Namespace) -> bool:
    return options.perplexity or (options.needle is None and options.tasks is None)


def _evaluation(options: argparse.Namespace, target: Target, world_size: int, *, has_gpu: bool) -> Evaluation:
    needle = tasks = None
    if options.needle is not None:
        asked = {"depths": options.depths, "samples": options.samples, "seed": options.seed}
        asked["sentence"] = options.needle_sentence
        needle = NeedlePlan(options.needle, **{name: value for name, value in asked.items() if value is not None})
    if options.tasks is not None:
        tasks = TasksPlan(options.tasks, options.include_path, options.num_fewshot, options.limit)
    is_ours = target.saved is not None
    return Evaluation(
        config=settle(target, world_size, has_gpu=has_gpu),
        checkpoint=target.place.folder if is_ours else None,
        hub_folder=None if is_ours else target.place.folder,
        output=target.output,
        packs=options.packs or target.config.train.eval_samples,
        perplexity=_wants_perplexity(options),
        needle=needle,
        tasks=tasks,
    )


def _check(evaluation: Evaluation, target: Target, *, is_started: bool) -> None:
    """Check what can be without torch; tasks by the process that starts the others, since it takes seconds."""
    from megatron_m1.evaluation.report import check_files

    if evaluation.perplexity or evaluation.needle is not None:
        check_corpora(target)
    if evaluation.perplexity and evaluation.packs < 1:
        raise ValueError("the run's train.eval_samples is 0: give --packs")
    if evaluation.needle is not None:
        evaluation.needle.check()
        check_lengths(evaluation.needle.lengths, evaluation.config)
    kinds = {"perplexity": evaluation.perplexity, "needle": evaluation.needle, "tasks": evaluation.tasks}
    check_files(evaluation.output, [kind for kind, wanted in kinds.items() if wanted])
    if evaluation.tasks is not None and not is_started:
        from megatron_m1.evaluation.tasks import check_tasks

        check_tasks(evaluation.tasks)


def _evaluate(evaluation: Evaluation) -> int:
    """Evaluate in this process; a failure that we know is one line."""
    from megatron_m1.convert.work import ConversionError
    from megatron_m1.evaluation.run import evaluate
    from megatron_m1.runtime.watchdog import CollectiveError

    try:
        evaluate(evaluation, _show)
    except (CollectiveError, ConversionError) as error:
        hung = isinstance(error, CollectiveError)
        report_once(error, name_silent_ranks=hung, patience=5.0 if hung else 10.0)
        return 1
    return 0


def _show(kind: str, record: dict[str, Any], files: list[Path]) -> None:
    from megatron_m1.evaluation.report import NO_PICTURE, tables

    print("\n".join([*tables(kind, record, terminal_columns()), ""]))
    for file in files:
        print(file)
    if kind != "tasks" and len(files) == 1:
        print(NO_PICTURE)
    print(flush=True)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(positive_integer(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part for part in text.split(",") if part)
    if not names:
        raise argparse.ArgumentTypeError("it is empty: give names")
    return names


def _count(text: str) -> int:
    return 0 if text == "0" else positive_integer(text)


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} has a part that is no number") from None
