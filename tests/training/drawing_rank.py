"""A process that draws a live line and waits to be ended: ``drawing_rank.py FOLDER hang|wait``."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from megatron_m1.config.tree import RunConfig
from megatron_m1.launch import prepare_worker
from megatron_m1.runtime.interrupt import Interrupt
from megatron_m1.runtime.watchdog import Watchdog
from megatron_m1.training.figures import Figure
from megatron_m1.training.metrics import MetricsLog

LOSS = Figure("loss", "loss {:.4f}")


def main(folder: Path, way: str) -> None:
    if "RANK" in os.environ:
        prepare_worker()
    with ExitStack() as held:
        log = held.enter_context(MetricsLog(folder, RunConfig(tensorboard=False), start_step=0, total_steps=9))
        held.enter_context(Interrupt(log.note))
        log.log_step(1, {LOSS: 1.25})
        if way == "hang":
            watchdog = held.enter_context(Watchdog(0, 0.01, grace_seconds=0.01, first_step_seconds=0.01))
            with watchdog.step(1):
                threading.Event().wait()
        while True:
            signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
