"""The packs of a run: training passes and the held-out set, and how many FLOPs some of them are worth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron_m1.config import ResolvedConfig
from megatron_m1.data.packed import PackedDataset, PackedSample, build_packed_dataset
from megatron_m1.data.packed.loader import PackedLoader
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.plan.flops import training_flops
from megatron_m1.runtime.mesh import Mesh


@dataclass(frozen=True)
class Feed:
    """Where a run's micro-batches come from."""

    training: PackedLoader
    validation: PackedLoader | None
    held_out: PackedDataset | None
    """All held-out packs, on every rank."""


def open_feed(config: ResolvedConfig, mesh: Mesh) -> Feed:
    """Build the datasets (collective: rank 0 builds the indices).

    Args:
        config: its ``data.train_samples`` are the packs of one pass, kept for the life of a run since their order
            depends on it. What goes past them is a further pass in another order.
        mesh: gives the data-parallel rank.
    """
    data, seed = config.data, config.train.seed
    tokenizer = load_tokenizer(data.tokenizer)

    def packs(blend: list[str], count: int, pass_seed: int) -> PackedDataset:
        return build_packed_dataset(
            blend,
            sequence_length=data.seq_length,
            num_samples=count,
            seed=pass_seed,
            tokenizer=tokenizer,
            cache_folder=data.cache_folder,
            reset_at_documents=data.reset_at_documents,
        )

    loader = partial(
        PackedLoader, data_parallel_rank=mesh.data_parallel_rank, data_parallel_size=mesh.data_parallel_size
    )
    training = loader(
        packs(data.train, data.train_samples, seed),
        global_batch_size=config.train.global_batch_size,
        next_pass=lambda index: packs(data.train, data.train_samples, seed + index),
    )
    if not data.validation or not config.train.eval_samples:
        return Feed(training, None, None)
    held_out = packs(data.validation, config.train.eval_samples, seed)
    return Feed(training, loader(held_out, global_batch_size=len(held_out)), held_out)


def useful_flops(config: ResolvedConfig, samples: list[PackedSample]) -> float:
    """Useful FLOPs of forward and backward over ``samples``, on all the ranks that share them."""
    return float(sum(training_flops(config.model, sample.cu_seqlens.diff().tolist()) for sample in samples))
