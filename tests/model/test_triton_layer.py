"""One whole lightning layer, forward and backward, on the Triton kernels under the interpreter and on torch's form."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_m1.packed import PackedBatchParams
from megatron_m1.parallel.layout import SequenceLayout
from tests.harness import WorkerPool
from tests.model.meshes import PACKS, run_config, start

TOLERANCE = 1e-5
"""Relative, float32: sums of a few hundred products, each rounded to 6e-8."""


def layer_gradients(rank: int, world_size: int, backend: str) -> dict[str, Tensor]:
    """The first layer's output and the gradients of its input and of every parameter."""
    trainer = start(run_config({}, lightning_backend=backend), world_size)
    layer = trainer.chunks[0].module.decoder.layers[0]
    generator = torch.Generator().manual_seed(5)
    shape = (PACKS[0][-1], 1, 40)
    x = torch.randn(shape, generator=generator).requires_grad_()
    layout = PackedBatchParams.of(SequenceLayout.build(PACKS[0]))
    y, _ = layer.self_attention(x, None, packed_seq_params=layout)
    parameters = dict(layer.self_attention.named_parameters())
    grads = torch.autograd.grad(y, [x, *parameters.values()], torch.randn(shape, generator=generator))
    return {"y": y.detach(), **dict(zip(["x", *parameters], grads, strict=True))}


def test_layer_on_the_kernels_equals_the_torch_layer(workers: WorkerPool) -> None:
    (ours,), (torchs,) = (workers.run(layer_gradients, name, world_size=1) for name in ("triton", "chunk"))
    assert ours.keys() == torchs.keys() and len(ours) >= 5
    for name, expected in torchs.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert bool(error <= TOLERANCE), f"{name}: {float(error)}"
