"""What stays fp32 in a bf16 run: router, head, slopes, master weights and moments, after build, step, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_m1.checkpoint.store import Checkpoints
from megatron_m1.config import Config
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.step import evaluate, train_step
from megatron_m1.training.trained_model import TrainedModel
from tests.model.meshes import my_share, packs, run_config, start

FP32_WEIGHTS = ("mlp.router.weight", "output_layer.weight")
BF16_TOLERANCE = 2.0**-8
"""Relative; one rounding to bf16, which a loss averaged over the batch stays within."""


def _wrong_dtypes(trained: TrainedModel, head: torch.dtype) -> list[str]:
    wrong = []
    for chunk in trained.chunks:
        for name, parameter in chunk.named_parameters():
            expected = torch.bfloat16
            if name.endswith(FP32_WEIGHTS):
                expected = head if name.endswith("output_layer.weight") else torch.float32
            if parameter.dtype != expected or parameter.main_grad.dtype != torch.float32:
                wrong.append(f"{name}: {parameter.dtype}, gradient {parameter.main_grad.dtype}")
        for name, buffer in chunk.named_buffers():
            if buffer.is_floating_point():
                wrong.append(f"buffer {name}")
        for layer in chunk.module.decoder.layers:
            slopes = getattr(layer.self_attention, "slopes", None)
            if slopes is not None and slopes.dtype != torch.float32:
                wrong.append(f"slopes {slopes.dtype}")
    for part in trained.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                tensors = [parameter, *(value for value in state.values() if torch.is_tensor(value))]
                wrong += [f"optimizer {t.dtype}" for t in tensors if t.dtype != torch.float32]
    return wrong


def bf16_run(rank: int, world_size: int, config: Config, folder: str, head: torch.dtype) -> dict[str, Any]:
    """Two steps in bf16, saved and loaded; dtypes at each point, losses before and after."""
    trained = start(config, world_size)
    wrong = {"built": _wrong_dtypes(trained, head)}
    batch = my_share(trained, packs())
    losses = [train_step(trained, batch, lr=1e-3).loss for _ in range(2)]
    wrong["stepped"] = _wrong_dtypes(trained, head)
    checkpoints = Checkpoints(Path(folder), keep=1, async_save=False, config=config, note=lambda line: None)
    checkpoints.save(trained, {"step": 2})
    at_save = evaluate(trained, batch).loss
    train_step(trained, batch, lr=1e-2)
    assert checkpoints.load_newest(trained) == {"step": 2}
    wrong["loaded"] = _wrong_dtypes(trained, head)
    return {"wrong": wrong, "losses": losses, "at_save": at_save, "after_load": evaluate(trained, batch).loss}


@pytest.mark.parametrize("head", ["fp32", "bf16"])
def test_dtypes_hold_through_build_step_save_and_load(head: str, workers: WorkerPool, tmp_path: Path) -> None:
    config = run_config({"tensor_model_parallel_size": 2}, {"precision": "bf16"}, lm_head_precision=head)
    dtype = torch.float32 if head == "fp32" else torch.bfloat16
    for result in workers.run(bf16_run, config, str(tmp_path), dtype, world_size=2):
        assert result["wrong"] == {"built": [], "stepped": [], "loaded": []}
        assert result["after_load"] == result["at_save"]


def first_loss(rank: int, world_size: int, config: Config) -> float:
    """Loss of one batch under the initial weights."""
    trained = start(config, world_size)
    return evaluate(trained, my_share(trained, packs())).loss


def test_bf16_agrees_with_fp32(workers: WorkerPool) -> None:
    (exact,) = workers.run(first_loss, run_config({}), world_size=1)
    for parallel in ({}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}):
        config = run_config(parallel, {"precision": "bf16"})
        for loss in workers.run(first_loss, config, world_size=2):
            assert loss == pytest.approx(exact, rel=BF16_TOLERANCE)


def head_gradients(rank: int, world_size: int) -> dict[str, Any]:
    """The FP32 head's logits alone, against fp64, with TF32 allowed around them."""
    from megatron_m1.parallel.vocab_head import vocab_logits

    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((7, 33), (41, 33), (7, 41)))
    x.requires_grad_()
    weight.requires_grad_()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    out = vocab_logits(x, weight, ieee_fp32=True)
    out.backward(grad)
    kept = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "none"
    wide = [t.detach().double() for t in (x, weight, grad)]
    truth = (wide[0] @ wide[1].t(), wide[2] @ wide[1], wide[2].t() @ wide[0])
    assert x.grad is not None and weight.grad is not None
    errors = [
        ((ours.double() - exact).norm() / exact.norm()).item()
        for ours, exact in zip((out.detach(), x.grad, weight.grad), truth, strict=True)
    ]
    return {"errors": errors, "switch": kept}


def test_fp32_head_is_fp32_and_leaves_the_tf32_switch_alone(workers: WorkerPool) -> None:
    (result,) = workers.run(head_gradients, world_size=1)
    assert result["switch"] == "tf32"
    assert max(result["errors"]) < 41 * 2.0**-24
