"""A worker of ``test_launch.py``: says that it is ready, waits for SIGTERM, says that it has saved."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from megatron_m1.launch import prepare_worker


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    prepare_worker()
    # Blocked until it is waited for, so that an early signal is not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    partial = folder / f"{rank}.partial"
    partial.write_text(str(os.getpid()))
    partial.rename(folder / f"{rank}.ready")
    signal.sigwait([signal.SIGTERM])
    (folder / f"{rank}.saved").touch()


if __name__ == "__main__":
    main()
