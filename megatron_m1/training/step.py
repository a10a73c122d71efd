"""One training step and one validation pass: megatron-core's schedule over this rank's micro-batches."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor
from torch import distributed as dist

from megatron_m1.data.packed import PackedSample
from megatron_m1.layers.head import token_losses
from megatron_m1.layers.router import Router
from megatron_m1.parallel.balance import ModelCost
from megatron_m1.runtime.mesh import Mesh
from megatron_m1.training.expert_load import load_figures
from megatron_m1.training.figures import Figure
from megatron_m1.training.microbatch import MicroBatch, make_micro_batch
from megatron_m1.training.objective import Objective
from megatron_m1.training.optimizer import step_if_finite
from megatron_m1.training.trained_model import TrainedModel

type Chunk = DistributedDataParallel | GPTModel


LOSS = Figure("loss", "loss {:.4f}", alarms=True, importance=9)
"""The objective over the global batch; of next tokens the mean over predicted ones, nats."""
AUX_LOSS = Figure("aux_loss", "aux {:.4f}", short="aux {:.2f}", importance=4)
"""Load-balancing loss, unweighted, mean over layers and packs (1 at balance); 0 for a validation, and where its weight
is 0."""
GRAD_NORM = Figure("grad_norm", "grad norm {:.3f}", short="grad {:.2f}", importance=7)
"""Before clipping; 0 for a validation."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports, the same on every rank."""

    updated: bool
    """False when the loss or the gradient norm is not finite, or not admitted: nothing was changed."""
    weight: float
    """What the sum over the global batch was divided by; of next tokens the number of predicted ones."""
    figures: dict[Figure, float]
    """LOSS, what the objective adds, AUX_LOSS, GRAD_NORM."""
    routing: dict[Figure, float]
    """How the tokens were dealt to the experts: figures of ``expert_load``."""
    forward_backward_seconds: float = 0.0
    """Of this rank, until the loss was known; 0 for a validation."""

    @property
    def loss(self) -> float:
        """LOSS among the figures."""
        return self.figures[LOSS]


class PackModel(Protocol):
    """A rank's share of a model as far as passes over packs go: wrapped for training, or bare."""

    @property
    def mesh(self) -> Mesh:
        """This rank's place."""

    @property
    def chunks(self) -> Sequence[Chunk]:
        """Pipeline chunks of this rank."""

    @property
    def seq_length(self) -> int:
        """Tokens of a pack, at most."""

    @property
    def pack_tokens(self) -> int:
        """Tokens of a pack once its end is padded."""

    @property
    def cost(self) -> ModelCost | None:
        """What layouts balance over context-parallel ranks."""

    def heartbeat(self) -> None:
        """Called before every micro-batch's forward pass."""


type AddUp = Callable[[Tensor, MicroBatch], tuple[Tensor, Tensor, Tensor]]
"""What the schedule asks of the last stage: the sum, a count of tokens, and what to hand through."""


def _padding_mask(batch: MicroBatch, model: Chunk, mesh: Mesh) -> Tensor | None:
    """bool [1, tokens] as the chunk wants it: only chunks with the embedding split it over tensor-parallel ranks."""
    if batch.padding is None or get_attr_wrapped_model(model, "pre_process"):
        return batch.padding
    if not get_attr_wrapped_model(model, "config").sequence_parallel:
        return batch.padding
    return batch.padding.chunk(mesh.groups.tp.size(), dim=1)[mesh.groups.tp.rank()]


def _forward_step(
    batches: Iterator[MicroBatch], model: Chunk, *, share: PackModel, add_up: AddUp, with_choices: bool
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    share.heartbeat()
    batch = next(batches)
    mask = _padding_mask(batch, model, share.mesh)
    output = token_losses(model, batch.tokens, batch.labels, batch.params, padding_mask=mask, with_choices=with_choices)
    return output, lambda result: add_up(result, batch)


def _add_up(losses: Tensor, batch: MicroBatch, *, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    total, figures = objective.total(losses, batch)
    report = torch.stack([value.detach().double() for value in (total, *(figures[f] for f in objective.figures))])
    # The schedule's count is a whole number; the step divides by the objective's weight instead.
    return total, total.new_zeros((), dtype=torch.int), report


def shared_micro_batches(share: PackModel, samples: list[PackedSample]) -> tuple[Iterator[MicroBatch], ...]:
    """Return an iterator for each virtual chunk; a micro-batch is laid out once, when the first chunk asks for it."""
    lay_out = partial(
        make_micro_batch,
        mesh=share.mesh,
        seq_length=share.seq_length,
        pack_tokens=share.pack_tokens,
        cost=share.cost,
    )
    return itertools.tee(map(lay_out, samples), len(share.chunks))


def run_schedule(
    share: PackModel, samples: list[PackedSample], add_up: AddUp, *, forward_only: bool, with_choices: bool = False
) -> list[Tensor]:
    """Run this rank's micro-batches through megatron-core's schedule.

    Args:
        share: the model.
        samples: this rank's packs, as many on every rank.
        add_up: called on last stages with what ``token_losses`` returns there.
        forward_only: leave out the backward passes.
        with_choices: as of ``token_losses``.

    Returns:
        What ``add_up`` handed through, one a pack, on last stages.
    """
    run = get_forward_backward_func()
    iterators = shared_micro_batches(share, samples)
    chunks = list(share.chunks)
    return run(
        forward_step_func=partial(_forward_step, share=share, add_up=add_up, with_choices=with_choices),
        data_iterator=list(iterators) if len(iterators) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(samples),
        seq_length=share.pack_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _run_schedule(trained: TrainedModel, samples: list[PackedSample], *, forward_only: bool) -> list[Tensor]:
    return run_schedule(trained, samples, partial(_add_up, objective=trained.objective), forward_only=forward_only)


def _routers(trained: TrainedModel) -> Iterator[tuple[int, Router]]:
    for chunk in trained.chunks:
        for layer in get_attr_wrapped_model(chunk, "decoder").layers:
            # Not every feed-forward kind has one.
            if isinstance(router := getattr(layer.mlp, "router", None), Router):
                yield layer.layer_number - 1, router


def _reduce_report(
    trained: TrainedModel, reports: list[Tensor], packs: int
) -> tuple[dict[Figure, float], float, dict[Figure, float]]:
    """LOSS and the objective's figures as sums, aux loss and experts' loads of the global batch: one all-reduce."""
    config, sums = trained.chunks[0].config, (LOSS, *trained.objective.figures)
    layers, experts = config.num_layers, config.num_moe_experts
    record = torch.zeros(len(sums) + layers * (experts + 2), dtype=torch.float64, device=trained.mesh.device)
    if trained.mesh.counts_loss:
        for report in reports:
            record[: len(sums)] += report
    per_layer = record[len(sums) :].view(layers, experts + 2)
    for index, router in _routers(trained):
        counts, kept, aux_loss = router.take_counts()
        for columns, value in ((slice(experts), counts), (experts, kept), (experts + 1, aux_loss)):
            if value is not None:
                per_layer[index, columns] += value
    get_moe_metrics_tracker().clear()
    dist.all_reduce(record)
    aux = float(per_layer[:, experts + 1].sum()) / (layers * packs)
    loads = load_figures(per_layer[:, :experts], per_layer[:, experts])
    return dict(zip(sums, record[: len(sums)].tolist(), strict=True)), aux, loads


def _batch_weight(trained: TrainedModel, samples: list[PackedSample]) -> float:
    """What the objective divides the global batch by."""
    weight = torch.stack([trained.objective.weight(sample).double() for sample in samples]).sum()
    weight = weight.to(trained.mesh.device)
    dist.all_reduce(weight, group=trained.mesh.groups.dp)
    if weight < 0:
        raise ValueError(f"the objective gives a batch the weight {float(weight)}: let every pack's be 0 or more")
    return float(weight)


def _divisor(weight: float) -> float:
    # A batch without any weight has no loss either.
    return weight or 1.0


def _scale_aux_loss(trained: TrainedModel, packs: int, weight: float) -> None:
    """Correct the aux loss for masked targets.

    megatron-core multiplies it by the routed tokens, and later all gradients are divided by the batch's weight, which
    is less where documents end, and anything where the objective weighs tokens.
    """
    # One element, not a scalar: the library keeps it between calls and copies into what it has kept.
    share = torch.tensor([weight / (packs * trained.pack_tokens)], device=trained.mesh.device)
    for chunk in trained.chunks:
        chunk.config.moe_grad_scale_func = lambda: share


def _packs(trained: TrainedModel, samples: list[PackedSample]) -> int:
    """Packs of the global batch of which ``samples`` are this rank's."""
    return len(samples) * trained.mesh.data_parallel_size


def compute_gradients(trained: TrainedModel, samples: list[PackedSample]) -> tuple[list[Tensor], float]:
    """Forward and backward over this rank's micro-batches; gradients of the batch's loss end up in the DDP buffers.

    Args:
        trained: what is trained.
        samples: this rank's packs, as many on every rank.

    Returns:
        One tensor of sums per pack, on last pipeline stages, and the weight of the global batch.
    """
    for chunk in trained.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    trained.optimizer.zero_grad()
    weight = _batch_weight(trained, samples)
    _scale_aux_loss(trained, _packs(trained, samples), weight)
    reports = _run_schedule(trained, samples, forward_only=False)
    share = 1.0 / torch.tensor(_divisor(weight), dtype=torch.float32, device=trained.mesh.device)
    for chunk in trained.chunks:
        chunk.scale_gradients(share)
    return reports, weight


def train_step(
    trained: TrainedModel, samples: list[PackedSample], lr: float, admits: Callable[[float], bool] = lambda norm: True
) -> StepResult:
    """One optimizer step on a global batch.

    Args:
        trained: what is trained.
        samples: this rank's packs of the batch.
        lr: learning rate.
        admits: as of ``step_if_finite``.

    Returns:
        The batch's figures; ``updated`` is False, and no parameter or bias changed, when loss or
        gradient are not finite, or not admitted.
    """
    began = time.perf_counter()
    buffers = [buffer for _, router in _routers(trained) for buffer in router.named_buffers()]
    biases = [(bias, bias.clone()) for name, bias in buffers if name == "expert_bias"]
    reports, weight = compute_gradients(trained, samples)
    # Reads the loss, hence waits for the device: what was queued there is done then.
    sums, aux_loss, loads = _reduce_report(trained, reports, _packs(trained, samples))
    seconds = time.perf_counter() - began
    means = {figure: value / _divisor(weight) for figure, value in sums.items()}
    is_finite = math.isfinite(means[LOSS])
    updated, norm = step_if_finite(trained.optimizer, lr, admits) if is_finite else (False, math.nan)
    if not updated:
        # The library moves them along with the gradients' reduction.
        for bias, before in biases:
            bias.copy_(before)
    figures = means | {AUX_LOSS: aux_loss, GRAD_NORM: norm}
    return StepResult(updated, weight, figures, loads, seconds)


@torch.no_grad()
def evaluate(trained: TrainedModel, samples: list[PackedSample]) -> StepResult:
    """Loss of a batch without gradients or update."""
    for chunk in trained.chunks:
        chunk.eval()
    weight = _batch_weight(trained, samples)
    reports = _run_schedule(trained, samples, forward_only=True)
    sums, _, loads = _reduce_report(trained, reports, _packs(trained, samples))
    means = {figure: value / _divisor(weight) for figure, value in sums.items()}
    return StepResult(False, weight, means | {AUX_LOSS: 0.0, GRAD_NORM: 0.0}, loads)
