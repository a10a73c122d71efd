"""Which pack goes where: the micro-batches of a step, from the number of samples consumed and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from megatron_m1.data.packed.sample import PackedSample


class Packs(Protocol):
    """A sized, indexed source of packs, such as ``packed.PackedDataset``."""

    def __len__(self) -> int:
        """Number of packs."""

    def __getitem__(self, index: int) -> PackedSample:
        """Pack ``index``."""


class PackedLoader:
    """Deals the packs of each step to the data-parallel ranks. It has no position: resuming is asking again.

    The global batch of the step that begins after c samples is packs c to c + ``global_batch_size`` - 1, on every mesh;
    micro-batch m of rank r is pack c + m x ``data_parallel_size`` + r.
    """

    def __init__(
        self,
        dataset: Packs,
        *,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        next_pass: Callable[[int], Packs] | None = None,
    ) -> None:
        """
        Args:
            dataset: the packs of pass 0.
            global_batch_size: packs per step over all ranks, a multiple of ``data_parallel_size``.
            data_parallel_rank: this rank's index among the data-parallel ranks.
            data_parallel_size: number of data-parallel ranks.
            next_pass: makes the packs of pass 1, 2, ..., as many as ``dataset`` has, usually with ``seed + pass``. It
                is called on all ranks in the same step, so it may be collective. None: there is one pass.

        Raises:
            ValueError: the sizes do not divide, the rank is out of range, or the dataset is empty.
        """
        if data_parallel_size < 1 or not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data_parallel_rank {data_parallel_rank} is not within 0 to {data_parallel_size - 1}")
        if global_batch_size < 1 or global_batch_size % data_parallel_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of the data-parallel size"
                f" {data_parallel_size}"
            )
        if len(dataset) == 0:
            raise ValueError("the dataset has no packs; ask for at least 1 sample")
        self.global_batch_size = global_batch_size
        self.num_microbatches = global_batch_size // data_parallel_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size
        self._samples_per_pass = len(dataset)
        self._first_pass = dataset
        self._next_pass = next_pass
        self._passes: dict[int, Packs] = {0: dataset}

    def microbatches(self, consumed_samples: int) -> list[PackedSample]:
        """This rank's micro-batches of the step that begins after ``consumed_samples`` packs of the whole run.

        With ``next_pass``, call it on all ranks for the same steps.

        Raises:
            ValueError: ``consumed_samples`` is negative, or the step goes past the only pass.
        """
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples is {consumed_samples}; it counts from 0")
        self._open_passes(consumed_samples, consumed_samples + self.global_batch_size)
        mine = range(consumed_samples + self._rank, consumed_samples + self.global_batch_size, self._size)
        return [self._passes[i // self._samples_per_pass][i % self._samples_per_pass] for i in mine]

    def _open_passes(self, start: int, stop: int) -> None:
        """Have the passes of packs start to stop - 1 ready, also those only other ranks read, and drop the rest."""
        wanted = range(start // self._samples_per_pass, (stop - 1) // self._samples_per_pass + 1)
        if self._next_pass is None and wanted[-1] > 0:
            raise ValueError(f"packs {start} to {stop - 1} go past the {self._samples_per_pass} packs of the dataset")
        opened: dict[int, Packs] = {}
        for index in wanted:
            opened[index] = self._passes[index] if index in self._passes else self._make_pass(index)
        self._passes = opened

    def _make_pass(self, index: int) -> Packs:
        if index == 0:
            return self._first_pass
        assert self._next_pass is not None
        packs = self._next_pass(index)
        if len(packs) != self._samples_per_pass:
            raise ValueError(
                f"pass {index} has {len(packs)} packs, pass 0 has {self._samples_per_pass}; keep the number"
            )
        return packs
