"""One checkpoint being written: megatron-core plans it, a thread of each rank writes and hashes this rank's file."""

from __future__ import annotations

import queue
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import distributed as dist
from torch.distributed.checkpoint.storage import WriteResult

from megatron_m1.checkpoint.folder import file_digests
from megatron_m1.checkpoint.state import Trained, train_state
from megatron_m1.files import refusal


def _use_plain_queue() -> None:
    # megatron-core's own queue starts a process that imports the main script again, which takes seconds and outlives a
    # killed rank. Threads of one process need none.
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


class _Strategy(TorchDistSaveShardedStrategy):
    """Keeps the writer and its metadata, so that the end of a save is ours.

    megatron-core's own leaves collectives open when the disk refuses on one rank: the others wait for it for ever.
    """

    def _get_save_and_finalize_callbacks(self, writer: Any, plan: Any, async_strategy: str) -> AsyncRequest:
        self.writer: FileSystemWriterAsync = writer
        self.metadata = plan[1]
        return super()._get_save_and_finalize_callbacks(writer, plan, async_strategy)


class Write:
    """A checkpoint on its way into a temporary folder. Every method is collective.

    Args:
        trained: what is saved.
        temporary: an empty folder.
        texts: files that the checkpoint gets besides, by name.
        in_background: training will go on, so what it changes is copied first.
        check_sharding: let megatron-core check that the ranks' pieces cover every tensor exactly once.
    """

    def __init__(
        self,
        trained: Trained,
        temporary: Path,
        texts: dict[str, str],
        *,
        in_background: bool,
        check_sharding: bool,
    ) -> None:
        _use_plain_queue()
        self.temporary = temporary
        self.texts = texts
        self._device = trained.mesh.device
        self._digests: dict[str, str] = {}
        self._error: str | None = None
        self._results: list[WriteResult] = []
        self._strategy = _Strategy()
        request: AsyncRequest = dist_checkpointing.save(
            train_state(trained, detached=in_background),
            str(temporary),
            FullyParallelSaveStrategyWrapper(self._strategy, trained.mesh.groups.dp_cp),
            validate_access_integrity=check_sharding,
            async_sharded_save=True,
            async_strategy="mcore",
        )
        # Both are None on a rank that has nothing to write.
        buckets = request.preload_fn() if request.preload_fn is not None else []
        transforms = request.async_fn.args[0] if request.async_fn is not None else []
        # A daemon: a run that fails for another reason must not wait for the disk.
        self._thread = threading.Thread(target=self._write, args=(transforms, buckets), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, transforms: list[Any], buckets: list[Any]) -> None:
        # What megatron-core's async_fn does, less its loss of the reason when the disk refuses.
        results: list[list[WriteResult]] = []
        for index, bucket in enumerate(buckets):
            _, outcome = FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, None, None, use_fsync=True
            )
            if isinstance(outcome, Exception):
                self._error = refusal(outcome, self.temporary)
                return
            results.append(outcome)
        self._results = list(chain.from_iterable(results))
        try:
            self._digests = file_digests(self.temporary, [name for _, name, _ in buckets])
        except OSError as error:
            self._error = refusal(error, self.temporary)

    def is_done(self) -> bool:
        """Whether all ranks have written their files."""
        busy = torch.tensor(int(self._thread.is_alive()), device=self._device)
        dist.all_reduce(busy)
        return not bool(busy)

    def finish(self) -> tuple[dict[str, str], str | None]:
        """Wait for the threads and write the metadata.

        Returns:
            On rank 0: sha256 of the ranks' files by name, and what went wrong in one line, or None. Elsewhere nothing
            of use.
        """
        self._thread.join()
        reports: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((self._results, self._digests, self._error), reports)
        if reports is None:
            return {}, None
        failure = next((error for _, _, error in reports if error is not None), None)
        if failure is None:
            failure = self._write_metadata([results for results, _, _ in reports])
        return {name: digest for _, digests, _ in reports for name, digest in digests.items()}, failure

    def _write_metadata(self, results: list[list[WriteResult]]) -> str | None:
        try:
            self._strategy.writer.finish(self._strategy.metadata, results)
            save_config(CheckpointingConfig(self._strategy.backend, self._strategy.version), str(self.temporary))
        except (OSError, RuntimeError) as error:
            return refusal(error, self.temporary)
        return None
