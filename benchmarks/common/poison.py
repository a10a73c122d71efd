"""Memory whose first content is NaN: a kernel that leaves part of its output unwritten fails its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


def _poisoned(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = factory(*args, **kwargs)
        if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        with torch.no_grad():
            return tensor.fill_(float("nan"))

    return make


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Make ``torch.empty``, ``empty_like``, ``empty_strided``, ``Tensor.new_empty`` give NaN-filled floating memory."""
    with (
        patch.object(torch, "empty", _poisoned(torch.empty)),
        patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        patch.object(torch, "empty_strided", _poisoned(torch.empty_strided)),
        patch.object(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty)),
    ):
        yield
