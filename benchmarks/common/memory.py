"""How much memory a part of a process takes at its peak."""

from __future__ import annotations

import threading
from pathlib import Path


def anonymous_memory() -> int:
    """Resident bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status: this needs Linux")


class PeakMemory:
    """The most anonymous memory while the block runs, beyond what there was before, sampled every 2 ms."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = anonymous_memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.peak = max(self.peak, anonymous_memory())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        """Bytes."""
        return self.peak - self.before
