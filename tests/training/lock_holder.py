"""A process that holds a run folder until it is ended: ``python -m tests.training.lock_holder FOLDER BEAT SILENCE``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from megatron_m1.training.run_folder import sole_writer


def main() -> None:
    """Say ``held``, then wait."""
    folder, beat, silence = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with sole_writer(Path(folder), print, beat_seconds=float(beat), silence_seconds=float(silence)):
            print("held", flush=True)
            signal.pause()
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
