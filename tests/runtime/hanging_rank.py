"""One rank of a run whose last rank never reaches the collective of step 3: ``hanging_rank.py RANK STORE TIMEOUT``."""

from __future__ import annotations

import datetime
import sys
import threading

import torch
import torch.distributed as dist

from megatron_m1.runtime.watchdog import CollectiveError, Watchdog, process_group_timeout

WORLD_SIZE = 2
HANGING_STEP = 3


def sleep_forever() -> None:
    """The culprit, which the printed stack must show."""
    threading.Event().wait()


def main(rank: int, store: str, timeout: float) -> int:
    # Both processes may start at different times: only the group of the steps has the short time-out.
    start = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE, timeout=start)
    group = dist.new_group(timeout=process_group_timeout("gloo", timeout))
    assert isinstance(group, dist.ProcessGroup)
    dist.barrier()
    with Watchdog(rank, timeout, grace_seconds=1.0, first_step_seconds=60.0) as watchdog:
        for step in range(1, HANGING_STEP + 1):
            try:
                with watchdog.step(step):
                    if step == HANGING_STEP and rank == WORLD_SIZE - 1:
                        sleep_forever()
                    dist.all_reduce(torch.ones(1), group=group)
            except CollectiveError as error:
                print(error, file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
