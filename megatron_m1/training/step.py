"""One training step and one validation pass: megatron-core's schedule over this rank's micro-batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor
from torch import distributed as dist

from megatron_m1.data.packed import PackedSample
from megatron_m1.parallel.balance import ModelCost
from megatron_m1.runtime.mesh import Mesh
from megatron_m1.training.microbatch import MicroBatch, make_micro_batch
from megatron_m1.training.optimizer import step_if_finite

type Chunk = DistributedDataParallel | GPTModel


@dataclass(frozen=True)
class StepResult:
    """What a step reports, the same on every rank."""

    loss: float
    """Mean over the global batch's predicted tokens, nats."""
    aux_loss: float
    """Load-balancing loss, unweighted, mean over layers and packs (1 at balance)."""
    grad_norm: float
    """Before clipping; 0 for a validation."""
    updated: bool
    """False when the loss or the gradient norm is not finite: nothing was changed."""
    loss_tokens: int
    """Predicted tokens in the global batch."""
    expert_load: float
    """Most loaded expert over the mean, averaged over layers."""


@dataclass
class Trainer:
    """The pieces that a step needs, built once by the loop."""

    mesh: Mesh
    chunks: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    seq_length: int
    """Tokens of a pack, at most."""
    pack_tokens: int
    """Tokens of a pack once its end is padded."""
    cost: ModelCost | None = None
    """What layouts balance over context-parallel ranks; None leaves them in zigzag order."""
    heartbeat: Callable[[], None] = lambda: None
    """Called before every micro-batch's forward pass."""

    def connect(self) -> None:
        """Give megatron-core's schedules the functions that they call on the wrapped chunks."""
        overlap = self.chunks[0].ddp_config
        many = len(self.chunks) > 1
        for chunk in self.chunks:
            config = chunk.config
            config.finalize_model_grads_func = finalize_model_grads
            if overlap.overlap_grad_reduce:
                no_sync = [c.no_sync for c in self.chunks]
                config.no_sync_func = no_sync if many else no_sync[0]
                if many:
                    config.grad_sync_func = [c.start_grad_sync for c in self.chunks]
            if overlap.overlap_param_gather:
                gather = [c.start_param_sync for c in self.chunks]
                config.param_sync_func = gather if many else None


def _padding_mask(batch: MicroBatch, model: Chunk, mesh: Mesh) -> Tensor | None:
    """bool [1, tokens] as the chunk wants it: only chunks with the embedding split it over tensor-parallel ranks."""
    if batch.padding is None or get_attr_wrapped_model(model, "pre_process"):
        return batch.padding
    if not get_attr_wrapped_model(model, "config").sequence_parallel:
        return batch.padding
    return batch.padding.chunk(mesh.groups.tp.size(), dim=1)[mesh.groups.tp.rank()]


def _forward_step(
    batches: Iterator[MicroBatch], model: Chunk, *, trainer: Trainer
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    trainer.heartbeat()
    batch = next(batches)
    output = model(
        batch.tokens,
        None,
        None,
        labels=batch.labels,
        packed_seq_params=batch.params,
        padding_mask=_padding_mask(batch, model, trainer.mesh),
    )

    def loss_sum(per_token: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = (per_token.float() * batch.loss_mask).sum()
        count = batch.loss_mask.sum().to(torch.int)
        # The schedule divides what it is given in place: report a copy.
        return total, count, {"loss_sum": total.detach().clone(), "loss_tokens": count}

    return output, loss_sum


def shared_micro_batches(trainer: Trainer, samples: list[PackedSample]) -> tuple[Iterator[MicroBatch], ...]:
    """Return an iterator for each virtual chunk; a micro-batch is laid out once, when the first chunk asks for it."""
    lay_out = partial(
        make_micro_batch,
        mesh=trainer.mesh,
        seq_length=trainer.seq_length,
        pack_tokens=trainer.pack_tokens,
        cost=trainer.cost,
    )
    return itertools.tee(map(lay_out, samples), len(trainer.chunks))


def _run_schedule(trainer: Trainer, samples: list[PackedSample], *, forward_only: bool) -> list[dict[str, Tensor]]:
    run = get_forward_backward_func()
    iterators = shared_micro_batches(trainer, samples)
    return run(
        forward_step_func=partial(_forward_step, trainer=trainer),
        data_iterator=list(iterators) if len(iterators) > 1 else iterators[0],
        model=trainer.chunks if len(trainer.chunks) > 1 else trainer.chunks[0],
        num_microbatches=len(samples),
        seq_length=trainer.pack_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _routers(trainer: Trainer) -> Iterator[tuple[int, Any]]:
    for chunk in trainer.chunks:
        for layer in get_attr_wrapped_model(chunk, "decoder").layers:
            yield layer.layer_number - 1, layer.mlp.router


def _reduce_report(trainer: Trainer, reports: list[dict[str, Tensor]], packs: int) -> tuple[float, int, float, float]:
    """Loss sum, loss tokens, aux loss and expert load of the global batch, with one all-reduce over the world."""
    config = trainer.chunks[0].config
    layers, experts = config.num_layers, config.num_moe_experts
    record = torch.zeros(2 + layers * (experts + 1), dtype=torch.float64, device=trainer.mesh.device)
    if trainer.mesh.counts_loss:
        for report in reports:
            record[0] += report["loss_sum"]
            record[1] += report["loss_tokens"]
    per_layer = record[2:].view(layers, experts + 1)
    for index, router in _routers(trainer):
        counts, aux_loss = router.take_counts()
        if counts is not None:
            per_layer[index, :experts] += counts
        if aux_loss is not None:
            per_layer[index, experts] += aux_loss
    get_moe_metrics_tracker().clear()
    dist.all_reduce(record)
    loads = per_layer[:, :experts]
    mean = loads.mean(dim=1)
    load = float((loads.amax(dim=1) / mean).mean()) if bool((mean > 0).all()) else 0.0
    aux = float(per_layer[:, experts].sum()) / (layers * packs)
    return float(record[0]), int(record[1]), aux, load


def _count_loss_tokens(trainer: Trainer, samples: list[PackedSample]) -> float:
    count = torch.stack([s.loss_mask.sum() for s in samples]).sum().to(trainer.mesh.device)
    dist.all_reduce(count, group=trainer.mesh.groups.dp)
    return float(count)


def _scale_aux_loss(trainer: Trainer, samples: list[PackedSample]) -> None:
    """Correct the aux loss for masked targets.

    megatron-core multiplies it by the routed tokens and later divides all gradients by the predicted tokens, which are
    fewer where documents end.
    """
    routed = len(samples) * trainer.mesh.data_parallel_size * trainer.pack_tokens
    # One element, not a scalar: the library keeps it between calls and copies into what it has kept.
    share = torch.tensor([_count_loss_tokens(trainer, samples) / routed], device=trainer.mesh.device)
    for chunk in trainer.chunks:
        chunk.config.moe_grad_scale_func = lambda: share


def compute_gradients(trainer: Trainer, samples: list[PackedSample]) -> list[dict[str, Tensor]]:
    """Forward and backward over this rank's micro-batches; gradients end up in the DDP buffers, per predicted token.

    Args:
        trainer: from the loop.
        samples: this rank's packs, as many on every rank.

    Returns:
        One record of loss sum and token count per pack, on last pipeline stages.
    """
    for chunk in trainer.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    _scale_aux_loss(trainer, samples)
    return _run_schedule(trainer, samples, forward_only=False)


def train_step(trainer: Trainer, samples: list[PackedSample], lr: float) -> StepResult:
    """One optimizer step on a global batch.

    Args:
        trainer: from the loop.
        samples: this rank's packs of the batch.
        lr: learning rate.

    Returns:
        The batch's figures; ``updated`` is False, and no parameter changed, when loss or gradient are not finite.
    """
    reports = compute_gradients(trainer, samples)
    packs = len(samples) * trainer.mesh.data_parallel_size
    loss_sum, loss_tokens, aux_loss, load = _reduce_report(trainer, reports, packs)
    loss = loss_sum / max(loss_tokens, 1)
    updated, norm = step_if_finite(trainer.optimizer, lr) if math.isfinite(loss) else (False, math.nan)
    return StepResult(loss, aux_loss, norm, updated, loss_tokens, load)


@torch.no_grad()
def evaluate(trainer: Trainer, samples: list[PackedSample]) -> StepResult:
    """Loss of a batch without gradients or update."""
    for chunk in trainer.chunks:
        chunk.eval()
    reports = _run_schedule(trainer, samples, forward_only=True)
    loss_sum, loss_tokens, _, _ = _reduce_report(trainer, reports, len(samples) * trainer.mesh.data_parallel_size)
    return StepResult(loss_sum / max(loss_tokens, 1), 0.0, 0.0, False, loss_tokens, 0.0)
