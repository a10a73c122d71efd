"""One of two ranks that are stopped while rank 0 waits for rank 1: ``stopped_rank.py RANK FOLDER TIMEOUT``."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_m1.runtime.watchdog import Watchdog

WORLD_SIZE = 2


def main(rank: int, folder: Path, timeout: float) -> None:
    start = datetime.timedelta(seconds=60)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE, timeout=start)
    group = dist.new_group(timeout=datetime.timedelta(seconds=timeout))
    assert isinstance(group, dist.ProcessGroup)
    dist.barrier()
    with Watchdog(rank, timeout, grace_seconds=1.0, first_step_seconds=0.0) as watchdog, watchdog.step(1):
        (folder / f"{rank}.ready").touch()
        if rank == 1:
            # It comes when the test has looked at both, stopped them and let them go on.
            while not (folder / "go").exists():
                watchdog.progress()
        dist.all_reduce(torch.ones(1), group=group)
    (folder / f"{rank}.done").touch()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
