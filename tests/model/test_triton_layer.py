"""One whole lightning layer, forward and backward, on the Triton kernels under the interpreter and on torch's form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.kernels.lightning import triton_attention
from megatron_m1.kernels.rmsnorm import triton_norm
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.runtime.pool import WorkerPool
from tests.model.meshes import PACKS, run_config, start

TOLERANCE = 1e-5
"""Relative, float32: sums of a few hundred products, each rounded to 6e-8."""


def kernels_ran(output: Tensor) -> set[str]:
    """Names of the autograd functions behind ``output``."""
    names, queue = set(), [output.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            names.add(node.name())
            queue += [parent for parent, _ in node.next_functions]
    return names


def layer_gradients(rank: int, world_size: int, backend: str) -> tuple[dict[str, Tensor], set[str]]:
    """The first layer's output and the gradients of its input and of every parameter; the autograd functions' names."""
    parallel: dict[str, Any] = {"tensor_model_parallel_size": world_size}
    trained = start(run_config(parallel, lightning_backend=backend), world_size)
    layer = trained.chunks[0].module.decoder.layers[0]
    generator = torch.Generator().manual_seed(5 + rank)
    shape = (PACKS[0][-1] // world_size, 1, 40)
    x = torch.randn(shape, generator=generator).requires_grad_()
    layout = PackedBatchParams.of(SequenceLayout.build(PACKS[0]))
    y, _ = layer.self_attention(x, None, packed_seq_params=layout)
    parameters = dict(layer.self_attention.named_parameters())
    grads = torch.autograd.grad(y, [x, *parameters.values()], torch.randn(shape, generator=generator))
    return {"y": y.detach(), **dict(zip(["x", *parameters], grads, strict=True))}, kernels_ran(y)


@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_layer_on_the_kernels_equals_the_torch_layer(workers: WorkerPool, tensor_ranks: int) -> None:
    ours, torchs = (workers.run(layer_gradients, name, world_size=tensor_ranks) for name in ("triton", "chunk"))
    kernels = {f"{op.__name__}Backward" for op in (triton_attention._SiluAttention, triton_norm._GatedNorm)}
    for (actual, ran), (expected, ran_in_torch) in zip(ours, torchs, strict=True):
        assert kernels <= ran and not kernels & ran_in_torch
        assert actual.keys() == expected.keys() and len(actual) >= 5
        for name, value in expected.items():
            error = (actual[name] - value).norm() / value.norm()
            assert bool(error <= TOLERANCE), f"{name}: {float(error)}"
