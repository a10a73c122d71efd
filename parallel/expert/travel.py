"""Rows of one token group on their way to the experts' ranks and back."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_m1.parallel.expert.links import Link, Work
from megatron_m1.parallel.expert.plan import Chunked


class Travel:
    """A buffer that is on its way, or was computed on another stream; ``arrived`` waits for it.

    Each start method replaces the buffer by what will arrive of it.
    """

    def __init__(self, value: Tensor) -> None:
        """``value`` has just been queued on the current stream."""
        self._value = value
        self._sent: Tensor | None = None
        self._work: Work | None = None
        self._event: torch.cuda.Event | None = None
        if value.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> Tensor:
        """Let the process (CPU) or the current stream (GPU) wait, and return the rows."""
        if self._work is not None:
            self._work.wait()
            if self._sent is not None and self._sent.is_cuda:
                # Another stream's memory, which would use it anew: that one has not waited until this had left.
                self._sent.record_stream(torch.cuda.current_stream())
        elif self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        if self._value.is_cuda:
            # The allocator must not give it away while this stream, which did not allocate it, reads it.
            self._value.record_stream(torch.cuda.current_stream())
        self._work = self._event = self._sent = None
        return self._value

    def _start(self, work: Work, sent: Tensor, value: Tensor) -> None:
        # What is sent lives until it has left.
        self._work, self._sent, self._value = work, sent, value

    def start_all_to_all(self, receives: list[int], sends: list[int], link: Link) -> None:
        """Send rows to every rank of EP, by their numbers, in the ranks' order."""
        sent = self.arrived()
        value = sent.new_empty(sum(receives), *sent.shape[1:])
        self._start(link.all_to_all(value, sent, receives, sends), sent, value)

    def start_gather(self, rows: Chunked, link: Link) -> None:
        """Gather the parts of all ETP ranks, each padded to ``rows.part``."""
        own = self.arrived()
        if len(own) < rows.part:
            own = torch.cat([own, own.new_zeros(rows.part - len(own), *own.shape[1:])])
        value = own.new_empty(rows.arrived, *own.shape[1:])
        self._start(link.all_gather(value, own), own, value)

    def start_reduce(self, rows: Chunked, received: int, link: Link) -> None:
        """Add up all ETP ranks' rows, and keep this rank's ``received``."""
        sent = self.arrived()
        part = sent.new_empty(rows.part, *sent.shape[1:])
        self._start(link.reduce_scatter(part, sent), sent, part[:received])


def spread(values: Tensor, rows: Chunked) -> Tensor:
    """Rows sorted by expert [rows, ...] back to where they lay among those that arrived, zeros between."""
    if rows.arrived == len(values):
        laid = torch.empty_like(values)
    else:
        laid = values.new_zeros(rows.arrived, *values.shape[1:])
    return laid.index_copy_(0, rows.order, values)
