"""One checkpoint being written: megatron-core plans it, a thread of each rank writes and hashes this rank's file."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_m1.training.checkpoint_folder import file_digests
from megatron_m1.training.checkpoint_state import train_state
from megatron_m1.training.step import Trainer


def _use_plain_queue() -> None:
    # megatron-core's own queue starts a process that imports the main script again, which takes seconds and outlives a
    # killed rank. Threads of one process need none.
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


class Write:
    """A checkpoint on its way into a temporary folder. Every method is collective.

    Args:
        trainer: what is saved.
        temporary: an empty folder.
        texts: files that the checkpoint gets besides, by name.
        in_background: training will go on, so what it changes is copied first.
        check_sharding: let megatron-core check that the ranks' pieces cover every tensor exactly once.
    """

    def __init__(
        self,
        trainer: Trainer,
        temporary: Path,
        texts: dict[str, str],
        *,
        in_background: bool,
        check_sharding: bool,
    ) -> None:
        _use_plain_queue()
        self.temporary = temporary
        self.texts = texts
        self._device = trainer.mesh.device
        self._digests: dict[str, str] = {}
        self._error: str | None = None
        self._request: AsyncRequest = dist_checkpointing.save(
            train_state(trainer, detached=in_background),
            str(temporary),
            FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), trainer.mesh.groups.dp_cp),
            validate_access_integrity=check_sharding,
            async_sharded_save=True,
            async_strategy="mcore",
        )
        arguments = list(self._request.async_fn_args)
        if self._request.preload_fn is not None:
            arguments[1] = self._request.preload_fn()
        # A daemon: a run that fails for another reason must not wait for the disk.
        self._thread = threading.Thread(target=self._write, args=(arguments,), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, arguments: list[Any]) -> None:
        if self._request.async_fn is None:
            return
        try:
            self._request.async_fn(*arguments)
            names = [Path(path).name for path, _, _ in arguments[1]]
            self._digests = file_digests(self.temporary, [n for n in names if (self.temporary / n).is_file()])
        except (OSError, AssertionError) as error:
            self._error = str(error)

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
        failure = None
        try:
            for finalize in self._request.finalize_fns:
                finalize()
        except CheckpointException as error:
            failure = _first_line(error)
        except OSError as error:
            failure = str(error)
        reports: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((self._digests, self._error), reports)
        digests: dict[str, str] = {}
        for digest, error in reports or []:
            digests |= digest
            failure = failure or error
        return digests, failure


def _first_line(error: CheckpointException) -> str | None:
    # Only the coordinator knows the failures: rank -> (exception, traceback).
    for exception, _ in error.failures.values():
        return str(exception).splitlines()[0]
    return None
