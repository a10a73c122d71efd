"""One evaluation from the process group to the files, on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_m1.checkpoint.folder import step_of
from megatron_m1.config import ResolvedConfig
from megatron_m1.data.corpora.blend import parse_blend
from megatron_m1.data.corpora.ids import check_token_ids
from megatron_m1.data.packed import build_packed_dataset
from megatron_m1.data.tokenizers import Tokenizer, load_tokenizer
from megatron_m1.evaluation.following import follow
from megatron_m1.evaluation.model import EvaluatedModel, open_model
from megatron_m1.evaluation.needle import Haystack, needle_retrieval
from megatron_m1.evaluation.plan import Evaluation, TasksPlan
from megatron_m1.evaluation.positions import perplexity
from megatron_m1.evaluation.report import NEEDLE, PERPLEXITY, TASKS, save
from megatron_m1.runtime import mesh as rank_grid
from megatron_m1.runtime.ranks import on_rank_zero
from megatron_m1.runtime.watchdog import Watchdog
from megatron_m1.training.init_from import imported_checkpoint

type Shown = Callable[[str, dict[str, Any], list[Path]], None]
"""Called on rank 0 with a kind of evaluation, its record and its files, as soon as they are there."""


def evaluate(evaluation: Evaluation, shown: Shown) -> None:
    """Evaluate a checkpoint as planned, on every rank of the world that torchrun (or nobody) started.

    Raises:
        CollectiveError: a collective failed or timed out.
        ConversionError: a Hugging Face folder could not be written as a checkpoint.
        ValueError: the checkpoint, the data or a task is not as it must be, or the results can't be written; one line.
    """
    config = evaluation.config
    mesh = rank_grid.initialise(config.parallel, seed=config.train.seed)
    try:
        with Watchdog(mesh.rank, config.parallel.distributed_timeout_seconds) as watchdog, watchdog.step(0):
            checkpoint = evaluation.checkpoint
            if checkpoint is None:
                checkpoint = imported_checkpoint(config, str(evaluation.hub_folder))
            model = open_model(config, mesh, checkpoint, watchdog.progress)
            tokenizer = load_tokenizer(config.data.tokenizer)
            with _Bar(mesh.rank == 0) as bar:
                for kind, record in _records(evaluation, model, tokenizer, bar):
                    whole = {
                        "checkpoint": str(checkpoint),
                        "step": step_of(checkpoint.resolve()),
                        **_setting(config, mesh),
                        **record,
                    }
                    files = on_rank_zero(partial(save, evaluation.output, kind, whole))
                    if mesh.rank == 0:
                        shown(kind, whole, files)
    finally:
        rank_grid.shut_down()


def _records(
    evaluation: Evaluation, model: EvaluatedModel, tokenizer: Tokenizer, bar: _Bar
) -> Iterator[tuple[str, dict[str, Any]]]:
    config = evaluation.config
    if evaluation.perplexity:
        packs = build_packed_dataset(
            config.data.validation,
            sequence_length=config.data.seq_length,
            num_samples=evaluation.packs,
            seed=config.train.seed,
            tokenizer=tokenizer,
            cache_folder=config.data.cache_folder,
            reset_at_documents=config.data.reset_at_documents,
        )
        sources = [os.path.abspath(prefix) for prefix in parse_blend(config.data.validation)[0]]
        record = perplexity(model, packs, sources, bar.start("packs", len(packs)))
        yield PERPLEXITY, {"seq_length": config.data.seq_length, "packs": len(packs), **record}
    plan = evaluation.needle
    if plan is not None:
        prefixes = parse_blend(config.data.validation)[0]
        cache = Path(config.data.cache_folder)
        check = partial(check_token_ids, prefixes, vocab_size=config.model.vocab_size, cache_folder=cache)
        on_rank_zero(check)
        haystack = Haystack(prefixes, tokenizer.eod)
        cases = len(plan.lengths) * len(plan.depths) * plan.samples
        yield NEEDLE, needle_retrieval(model, plan, haystack, tokenizer, bar.start("needles", cases))
    if evaluation.tasks is not None:
        yield TASKS, _tasks(evaluation.tasks, model, tokenizer, bar)


def _tasks(plan: TasksPlan, model: EvaluatedModel, tokenizer: Tokenizer, bar: _Bar) -> dict[str, Any]:
    """Rank 0's record; the others' is empty."""
    if model.mesh.rank != 0:
        follow(model)
        return {}
    # lm-eval takes seconds to import, and no other rank needs it.
    from megatron_m1.evaluation.adapter import run_tasks

    return run_tasks(model, tokenizer, plan, bar.start)


def _setting(config: ResolvedConfig, mesh: rank_grid.Mesh) -> dict[str, Any]:
    """What a figure may depend on in its last digits."""
    parallel = config.parallel
    return {
        "precision": config.train.precision,
        "processes": mesh.world_size,
        "tensor": parallel.tensor_model_parallel_size,
        "context": parallel.context_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "expert": parallel.expert_model_parallel_size,
    }


class _Bar:
    """A progress bar on the terminal of rank 0; elsewhere nothing."""

    def __init__(self, is_first: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (is_first and console.is_terminal),
        )

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start(self, what: str, total: int) -> Callable[[int], None]:
        """Begin to count ``total`` things; what is returned counts them."""
        task = self._progress.add_task(what, total=total)
        return lambda done: self._progress.advance(task, done)
