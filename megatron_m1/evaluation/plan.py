"""What is evaluated and how, decided before torch is imported."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_m1.checkpoint.contents import check_shape
from megatron_m1.checkpoint.folder import run_folder_of
from megatron_m1.config import Config, ResolvedConfig, RunConfig
from megatron_m1.config.io import parse_config
from megatron_m1.config.paths import HUGGING_FACE
from megatron_m1.config.resolve import resolve
from megatron_m1.convert.sources import initial_base
from megatron_m1.data.corpora.blend import check_blend
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.files import check_writable
from megatron_m1.library.places import Place, find_place, find_tokenizer
from megatron_m1.printing import counted

FOLDER = "evaluation"
"""Below a run's folder; the checkpoint's name is below that."""
GROUP = "parallel."
FIELDS = (
    "data.seq_length",
    "data.validation",
    "data.tokenizer",
    "data.cache_folder",
    "data.reset_at_documents",
    "train.precision",
    "model.rotary_base",
    "model.lm_head_precision",
    "model.lm_head_chunk_mib",
    "model.lightning_backend",
    "model.transformer_impl",
    "model.moe_token_dispatcher_type",
)
"""What a flag may say besides the mesh: anything else is no matter of an evaluation, or would be another model."""


@dataclass(frozen=True)
class NeedlePlan:
    """Which sentences are hidden in which haystacks."""

    lengths: tuple[int, ...]
    """Tokens of a pack, each with all ``depths``."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Share of the haystack before the needle."""
    samples: int = 4
    """Of each length and depth."""
    seed: int = 1234
    """Of keys, values and haystacks."""
    sentence: str = "The secret number of the {key} is {value}."
    """The needle; what stands before ``{value}`` is the question."""

    def check(self) -> None:
        """Check the numbers and the sentence.

        Raises:
            ValueError: one is out of range; one line.
        """
        for depth in self.depths:
            if not 0.0 <= depth <= 1.0:
                raise ValueError(f"--depths has {depth}: give shares from 0 (the start) to 1 (the end)")
        for mark in ("{key}", "{value}"):
            if self.sentence.count(mark) != 1:
                raise ValueError(f"--needle-sentence {self.sentence!r}: it must have {mark} once")
        if self.sentence.index("{key}") > self.sentence.index("{value}"):
            raise ValueError(f"--needle-sentence {self.sentence!r}: {{key}}, which is asked for, must come first")
        if not self.sentence.partition("{value}")[0].strip():
            raise ValueError(f"--needle-sentence {self.sentence!r}: nothing stands before {{value}} to ask with")


@dataclass(frozen=True)
class TasksPlan:
    """Which tasks of lm-eval are run."""

    names: tuple[str, ...]
    include_path: Path | None = None
    """Folder of further task files."""
    num_fewshot: int | None = None
    """Examples in the prompt; None leaves that to the task."""
    limit: int | None = None
    """Questions of each task, the first ones; None takes all."""


@dataclass(frozen=True)
class Evaluation:
    """One call of the command."""

    config: ResolvedConfig
    """Of the checkpoint, on this mesh; its ``run.folder`` is ``output``."""
    checkpoint: Path | None
    """None if it has yet to be made of ``hub_folder``."""
    hub_folder: Path | None
    output: Path
    packs: int
    """Of the validation blend, for the perplexity."""
    perplexity: bool
    needle: NeedlePlan | None
    tasks: TasksPlan | None

    @property
    def source(self) -> Path:
        """What is evaluated."""
        source = self.checkpoint or self.hub_folder
        assert source is not None
        return source


@dataclass(frozen=True)
class Target:
    """What a path and flags make of a model, before the number of processes is known."""

    place: Place
    config: Config
    saved: Config | None
    """Of the checkpoint, without the flags."""
    output: Path
    tokenizer: Tokenizer


def find_target(path: Path, flags: Sequence[str], *, options: Sequence[str], output: Path | None) -> Target:
    """Read what is to be evaluated: its configuration with the flags laid over it, and its tokenizer.

    Args:
        path: a run, for its newest complete checkpoint, a checkpoint, or a Hugging Face folder.
        flags: ``--group.field value``, those of the mesh and of ``FIELDS``.
        options: names of the command's own, which an unknown flag may have meant.
        output: folder of what is found; None is below the run's own.

    Raises:
        ValueError: there is none, a flag has nothing to do with it or makes it another model, or it has no tokenizer;
            one line.
    """
    place = find_place(path)
    saved = place.config
    base = _base(place)
    config = parse_config([], flags, command_options=options, base=base)
    _check_flags(flags)
    if not config.data.tokenizer and place.tokenizer is not None:
        config = replace(config, data=replace(config.data, tokenizer=str(place.tokenizer)))
    if saved is not None:
        check_shape(config.model, saved.model, place.folder, fix="an evaluation can't change that, leave it out")
    tokenizer = find_tokenizer(place, config.data.tokenizer or None, fix="give --tokenizer")
    if isinstance(tokenizer, str):
        raise ValueError(tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocab_size is "
            f"{config.model.vocab_size}: it is another model's, give --tokenizer"
        )
    if output is None:
        if saved is None:
            raise ValueError(f"{path} is a Hugging Face folder, nothing is written into it: give --output FOLDER")
        output = run_folder_of(place.folder) / FOLDER / place.folder.resolve().name
    check_writable(f"the results' folder {output}", output)
    return Target(place, config, saved, output, tokenizer)


def _base(place: Place) -> Config:
    if place.config is None:
        return initial_base(Config(run=RunConfig(init_from=f"{HUGGING_FACE}{place.folder}")))
    from megatron_m1.checkpoint.contents import read_checkpoint

    contents = read_checkpoint(place.folder, with_tensors=False)
    # What was asked leaves open what depends on the machine; where the data are, only the other one knows.
    data = replace(contents.became.data, tokenizer=str(contents.tokenizer or ""))
    return replace(contents.config, data=data)


def _check_flags(flags: Sequence[str]) -> None:
    for word in flags:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and not name.startswith(GROUP) and name not in FIELDS:
            raise ValueError(
                f"--{name} changes nothing about an evaluation, or makes it one of another model: leave it out; what "
                f"may be given are --{GROUP}* and --{', --'.join(FIELDS)}"
            )


def settle(target: Target, world_size: int, *, has_gpu: bool) -> ResolvedConfig:
    """Resolve a target's configuration for a mesh. What only training has is left out, and no token is dropped.

    Raises:
        ValueError: the mesh does not divide the world or the model; one line.
    """
    config = target.config
    # Any data-parallel size deals these out, and so do interleaved stages; who evaluates deals packs itself.
    batch = world_size * max(1, config.parallel.pipeline_model_parallel_size)
    cache = config.data.cache_folder
    is_ours = cache is not None and os.access(cache, os.W_OK)
    return resolve(
        replace(
            config,
            model=replace(config.model, moe_expert_capacity_factor=None),
            parallel=replace(config.parallel, overlap_grad_reduce=False, overlap_param_gather=False),
            data=replace(
                config.data,
                embedded_corpus=None,
                cache_folder=cache if is_ours else str(target.output / "data_cache"),
            ),
            train=replace(
                config.train,
                global_batch_size=batch,
                global_batch_size_schedule=[],
                eval_samples=batch,
                recompute_granularity=None,
                profile_step_start=None,
                profile_step_end=None,
            ),
            run=replace(config.run, folder=str(target.output), init_from=None, wandb_project=None),
            # A checkpoint has its own stage's configuration.
            stages=[],
        ),
        world_size,
        has_gpu=has_gpu,
    )


def check_corpora(target: Target) -> None:
    """Check that there are corpora to evaluate on, and that they are the tokenizer's.

    Raises:
        ValueError: there are none, or one is missing or damaged; one line.
    """
    blend = target.config.data.validation
    if not blend:
        raise ValueError(f"{target.place.folder} has no validation data: give --data PREFIX, a tokenised corpus")
    try:
        check_blend(blend, tokenizer_digest=target.tokenizer.digest())
    except FileNotFoundError as error:
        raise ValueError(f"validation data: {error}") from error
    except ValueError as error:
        raise ValueError(f"validation data: {error}") from error


def check_lengths(lengths: Sequence[int], config: ResolvedConfig) -> None:
    """Check that context-parallel ranks can share packs of these lengths; any other length is padded for them.

    Raises:
        ValueError: a pack is too short for them; one line.
    """
    context = config.parallel.context_parallel_size
    groups, sharers = config.parallel.moe_token_groups, context * config.parallel.tensor_model_parallel_size
    # A pack is padded to what the ranks divide; each then has as many tokens as groups.
    least = max(2, 2 * context if context > 1 else 2, (groups - 1) * sharers + 1)
    for length in lengths:
        if length < least:
            raise ValueError(
                f"a pack of {counted(length, 'token')} is too short for parallel.context_parallel_size = {context} and "
                f"parallel.moe_token_groups = {groups}: give {least} or more, or lower these"
            )


def padded_tokens(tokens: int, config: ResolvedConfig) -> int:
    """Tokens of a pack once its end is padded to what context- and tensor-parallel ranks divide."""
    context, tensor = config.parallel.context_parallel_size, config.parallel.tensor_model_parallel_size
    multiple = context * tensor
    return math.ceil(max(tokens, 2 * context) / multiple) * multiple
