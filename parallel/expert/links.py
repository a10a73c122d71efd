"""The collectives of one lane of an expert layer, each started at once and waited for later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Wait for it: the calling process on a CPU, the current stream on a GPU."""
        ...


class Link(Protocol):
    """One process group's collectives, which run one after the other."""

    @property
    def size(self) -> int:
        """Ranks of the group."""
        ...

    def all_to_all(self, output: Tensor, input: Tensor, receives: list[int], sends: list[int]) -> Work:
        """Rows of ``input`` to every rank, those of every rank to ``output``."""
        ...

    def all_gather(self, output: Tensor, input: Tensor) -> Work:
        """Every rank's ``input``, end to end."""
        ...

    def reduce_scatter(self, output: Tensor, input: Tensor) -> Work:
        """This rank's part of the sum of all ranks' ``input``."""
        ...

    def lane(self) -> AbstractContextManager[None]:
        """Inside the block, work is queued where this link's own copies are made, beside the products."""
        ...

    def follow(self) -> None:
        """Let what is queued there from now on wait for what the current stream has queued."""
        ...


def _started(work: Work | None) -> Work:
    assert work is not None, "an asynchronous collective of a group that this rank is in"
    return work


@cache
def _stream_of(group: str, device: int) -> torch.cuda.Stream:
    # One for all layers: the allocator keeps what a stream has freed for that stream alone.
    return torch.cuda.Stream(device)


class GroupLink:
    """A ``Link`` over a process group, whose links share a stream of their own on a GPU."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        on_gpu = dist.get_backend(group) == "nccl"
        self._stream = _stream_of(group.group_name, torch.cuda.current_device()) if on_gpu else None

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self._group.size()

    def all_to_all(self, output: Tensor, input: Tensor, receives: list[int], sends: list[int]) -> Work:
        """Rows of ``input`` to every rank, those of every rank to ``output``."""
        return _started(dist.all_to_all_single(output, input, receives, sends, group=self._group, async_op=True))

    def all_gather(self, output: Tensor, input: Tensor) -> Work:
        """Every rank's ``input``, end to end."""
        return _started(dist.all_gather_into_tensor(output, input, group=self._group, async_op=True))

    def reduce_scatter(self, output: Tensor, input: Tensor) -> Work:
        """This rank's part of the sum of all ranks' ``input``."""
        return _started(dist.reduce_scatter_tensor(output, input, group=self._group, async_op=True))

    def lane(self) -> AbstractContextManager[None]:
        """The stream of this link's copies."""
        return nullcontext() if self._stream is None else _on(self._stream)

    def follow(self) -> None:
        """Let the stream of this link's copies wait for the current one."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    with torch.cuda.stream(stream):
        yield


@dataclass(frozen=True)
class Links:
    """Those of a layer; None where there is one rank."""

    expert: Link | None
    tensor: Link | None
