"""The packs of a run: the stream that it trains on and the held-out set, and how many FLOPs some of them are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_m1.config import ResolvedConfig
from megatron_m1.config.schedules import Schedules
from megatron_m1.data.packed import PackedDataset, PackedSample, build_packed_dataset
from megatron_m1.data.stream import PackPlan, Stream, StreamConfig, open_stream
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.plan.flops import training_flops
from megatron_m1.runtime.mesh import Mesh
from megatron_m1.training.blend import caps_by_prefix, open_blends


@dataclass(frozen=True)
class Feed:
    """Where a run's micro-batches come from."""

    stream: Stream
    """That of all ranks, in the same place on each."""
    held_out: PackedDataset | None
    """All held-out packs, on every rank."""
    rank: int
    size: int
    """This rank's place among those of data parallelism."""

    def take(self, packs: int, *, tokens: int) -> list[PackPlan]:
        """Go on by a step, and return what this rank's micro-batches are made of: packs ``rank``, ``rank + size``, ...

        Args:
            packs: of the step, a multiple of ``size``.
            tokens: of the run before it.
        """
        return self.stream.take(packs, tokens=tokens)[self.rank :: self.size]

    def read(self, plans: Sequence[PackPlan]) -> list[PackedSample]:
        """Read the packs that ``take`` returned."""
        return [self.stream.read(plan) for plan in plans]

    def held_out_share(self) -> list[PackedSample]:
        """Read this rank's held-out packs: ``rank``, ``rank + size``, ..., as many on every rank; none without any."""
        if self.held_out is None:
            return []
        return [self.held_out[index] for index in range(self.rank, len(self.held_out), self.size)]


def open_feed(
    config: ResolvedConfig,
    mesh: Mesh,
    schedules: Schedules,
    state: Mapping[str, Any] | None,
    note: Callable[[str], None],
) -> Feed:
    """Open the stream where it goes on, and the held-out packs (collective: rank 0 builds their index).

    Args:
        config: of the stage.
        mesh: gives the data-parallel rank.
        schedules: of the stage, whose blend may change with the tokens.
        state: of the stream that the run was on; None begins the data.
        note: takes a line when a corpus is used up.
    """
    data, seed = config.data, config.train.seed
    tokenizer = load_tokenizer(data.tokenizer)
    blends = open_blends(schedules, data.train)
    stream = open_stream(
        StreamConfig(
            prefixes=blends.prefixes,
            sequence_length=data.seq_length,
            packing=data.packing,
            seed=seed,
            reset_at_documents=data.reset_at_documents,
            max_epochs=caps_by_prefix(data, blends.prefixes),
        ),
        tokenizer=tokenizer,
        weights=blends.weights,
        state=state,
        note=note,
        cache_folder=data.cache_folder,
    )
    place = mesh.data_parallel_rank, mesh.data_parallel_size
    if not data.validation or not config.train.eval_samples:
        return Feed(stream, None, *place)
    held_out = build_packed_dataset(
        data.validation,
        sequence_length=data.seq_length,
        num_samples=config.train.eval_samples,
        seed=seed,
        tokenizer=tokenizer,
        cache_folder=data.cache_folder,
        reset_at_documents=data.reset_at_documents,
    )
    return Feed(stream, held_out, *place)


def useful_flops(config: ResolvedConfig, samples: list[PackedSample]) -> float:
    """Useful FLOPs of forward and backward over ``samples``, on all the ranks that share them."""
    return float(sum(training_flops(config.model, sample.cu_seqlens.diff().tolist()) for sample in samples))
