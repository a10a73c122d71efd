"""A process group whose messages take as long as a slower network's: the same collectives, waited for longer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_m1.parallel.expert.links import GroupLink, Work


@dataclass
class _SlowWork:
    work: Work
    until: float

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.until - time.monotonic()))


class SlowLink(GroupLink):
    """Messages take ``latency`` seconds and their bytes at ``bytes_per_second``, one after the other.

    They travel while the process computes: only who waits sleeps.
    """

    def __init__(self, group: dist.ProcessGroup, *, latency: float, bytes_per_second: float) -> None:
        super().__init__(group)
        self._latency, self._rate = latency, bytes_per_second
        self._free = 0.0

    def _slowly(self, work: Work, arriving: Tensor) -> Work:
        # What comes from other ranks; what a rank sends itself does not cross the network.
        size = arriving.numel() * arriving.element_size() * (self.size - 1) / self.size
        self._free = max(self._free, time.monotonic()) + self._latency + size / self._rate
        return _SlowWork(work, self._free)

    def all_to_all(self, output: Tensor, input: Tensor, receives: list[int], sends: list[int]) -> Work:
        """As ``GroupLink``'s, later."""
        return self._slowly(super().all_to_all(output, input, receives, sends), output)

    def all_gather(self, output: Tensor, input: Tensor) -> Work:
        """As ``GroupLink``'s, later."""
        return self._slowly(super().all_gather(output, input), output)

    def reduce_scatter(self, output: Tensor, input: Tensor) -> Work:
        """As ``GroupLink``'s, later."""
        return self._slowly(super().reduce_scatter(output, input), input)
