"""The process-wide TF32 switch, off inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ieee_fp32_matmul() -> Iterator[None]:
    """Matrix products of fp32 tensors in full fp32 inside the block, whatever the process-wide TF32 switch says."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
