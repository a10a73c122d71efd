"""What megatron-core takes from ``torch.cuda``, for processes without a GPU.

megatron-core reads the current device, streams, events and generators from ``torch.cuda`` and spells some devices as
the literal "cuda". ``install`` answers all of that with the CPU, so that the same schedules, optimizer and checkpoints
run on gloo. It does nothing where CUDA is available. It is process-wide: keep it away from code that counts on the meta
device.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn")

NORM_PIECE = 4096
"""Elements whose squares are summed in fp32; longer sums are in fp64, which alone would be 40 times slower."""

PATCHED_LIBRARY_SYMBOLS = (
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state"),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"),
    ("megatron.core.transformer.moe.moe_utils", "maybe_move_tensor_to_cpu"),
    ("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu"),
    ("megatron.core.tensor_parallel.mappings", "_gather_along_first_dim"),
    ("megatron.core.tensor_parallel.mappings", "_reduce_scatter_along_first_dim"),
    ("megatron.core.distributed.param_and_grad_buffer", "dist_all_gather_func"),
    ("megatron.core.distributed.param_and_grad_buffer", "dist_reduce_scatter_func"),
    ("megatron.core.optimizer.clip_grads", "l2_norm_impl"),
)
"""Every name of megatron-core that ``install`` replaces, as (module, attribute)."""


class _Stream:
    """A stream on a device that has none: work is done when the call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: object = None) -> _Event:
        return _Event()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class _Event:
    """An event that has always happened."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_DEFAULT_STREAM = _Stream()


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[None]:
    yield


def _get_rng_state(device: object = None, **_: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = None, **_: object) -> None:
    torch.set_rng_state(new_state)


def _means_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _redirected(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _means_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    # The distributed optimizer sorts parameters by comparing with 'torch.cuda.FloatTensor' and the like.
    @functools.wraps(original)
    def cuda_spelling(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return cuda_spelling


def _splits_as_numpy(tensor: torch.Tensor | None, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Splits for all-to-all arrive as numpy, as the library's GPU branch hands them over."""
    if torch.is_tensor(tensor) and as_numpy:
        return tensor.numpy()
    return tensor


def _padded_gather(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """gloo has no uneven all-gather: pad to the longest part, gather, cut."""

    @functools.wraps(original)
    def gather(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        longest = int(max(output_split_sizes))
        padded = input_.new_zeros((longest, *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[: int(size)] for part, size in zip(parts, output_split_sizes, strict=True)])

    return gather


def _sliced_reduce_scatter(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """gloo has no uneven reduce-scatter: reduce everything, keep this rank's part."""

    @functools.wraps(original)
    def reduce_scatter(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, use_global_buffer)
        total = input_.contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        rank = group.rank()
        start = int(sum(input_split_sizes[:rank]))
        return total[start : start + int(input_split_sizes[rank])].clone()

    return reduce_scatter


def _none_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """In a group of one, whose only shard is the whole DDP buffer, gloo would copy that buffer twice for nothing."""

    @functools.wraps(original)
    def collective(
        output: torch.Tensor, input_: torch.Tensor, *, group: torch.distributed.ProcessGroup, **how: Any
    ) -> Any:
        if group.size() == 1 and output.data_ptr() == input_.data_ptr():
            return None
        return original(output, input_, group=group, **how)

    return collective


def _norm_by_pieces(
    chunk_size: int, overflow: torch.Tensor, tensors: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Norm of all ``tensors`` as fp32 [1]. torch sums a whole CPU tensor's squares in fp32: 4 million lose 9e-5."""
    norms = []
    for tensor in (tensor for part in tensors for tensor in part):
        flat = tensor.reshape(-1)
        whole = flat.numel() - flat.numel() % NORM_PIECE
        norms += [
            torch.linalg.vector_norm(flat[:whole].view(-1, NORM_PIECE), dim=1).double(),  # [pieces]
            torch.linalg.vector_norm(flat[whole:]).double().view(1),
        ]
    return torch.linalg.vector_norm(torch.cat(norms)).float().view(1), None


def _patch_torch() -> None:
    cpu = torch.device("cpu")
    replacements: dict[str, Any] = {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: _DEFAULT_STREAM,
        "default_stream": lambda device=None: _DEFAULT_STREAM,
        "stream": _stream_context,
        "synchronize": lambda device=None: None,
        "current_device": lambda: cpu,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.manual_seed,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.random.get_rng_state = _get_rng_state
    torch.cuda.random.set_rng_state = _set_rng_state
    # ``with torch.device("meta")`` recognises factories by a list that it makes once: let it list the originals.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _redirected(getattr(torch, name)))
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _patch_megatron() -> None:
    replacements: dict[str, Callable[[Any], Any]] = {
        "_get_cuda_rng_state": lambda original: (
            lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
        ),
        "_set_cuda_rng_state": lambda original: (
            lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
        ),
        "maybe_move_tensor_to_cpu": lambda original: _splits_as_numpy,
        "_gather_along_first_dim": _padded_gather,
        "_reduce_scatter_along_first_dim": _sliced_reduce_scatter,
        "dist_all_gather_func": _none_alone,
        "dist_reduce_scatter_func": _none_alone,
        "l2_norm_impl": lambda original: _norm_by_pieces,
    }
    for module_name, attribute in PATCHED_LIBRARY_SYMBOLS:
        module = importlib.import_module(module_name)
        setattr(module, attribute, replacements[attribute](getattr(module, attribute)))


def is_installed() -> bool:
    """Whether ``install`` has replaced ``torch.cuda``'s functions in this process."""
    return issubclass(torch.cuda.Stream, _Stream)


def install() -> None:
    """Let megatron-core run in this process without a GPU. Idempotent; does nothing where CUDA is available."""
    if torch.cuda.is_available() or is_installed():
        return
    _patch_torch()
    _patch_megatron()
