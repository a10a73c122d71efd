"""What the mesh tests run on every rank: one global batch on some mesh, and every gradient of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.resolve import resolve
from megatron_m1.data.packed import PackedSample
from megatron_m1.parallel.balance import ModelCost
from megatron_m1.runtime import mesh
from megatron_m1.training.objective import Objective
from megatron_m1.training.step import StepResult, train_step
from megatron_m1.training.trained_model import TrainedModel, build_trained_model, finalize_undivided
from tests.tolerances import whole_model

PACKS = [
    [0, 1, 20, 37, 50],
    [0, 50],
    [0, 5, 6, 7, 44, 50],
    [0, 24, 50],
]
"""Document bounds of the four micro-batches. 2 and 5 ranks divide their 50 tokens, 3 and 4 pad them, no chunk fits."""


@dataclass
class Part:
    """One rank's piece of a parameter's gradient, and where it lies."""

    value: Tensor
    tp_rank: int
    tp_size: int
    dim: int
    """Dimension that tensor (or expert-tensor) parallelism splits; -1 for a replicated parameter."""


def model_config(**changes: Any) -> ModelConfig:
    """Eight layers 7:1 with odd widths, four experts."""
    values: dict[str, Any] = dict(
        num_layers=8,
        hidden_size=40,
        num_attention_heads=4,
        kv_channels=16,
        num_query_groups=2,
        moe_ffn_hidden_size=36,
        num_moe_experts=4,
        vocab_size=104,
        moe_aux_loss_coeff=0.02,
        lm_head_chunk_mib=0.005,  # 48 tokens take several chunks
    )
    return ModelConfig(**(values | changes))


COPIES = whole_model(model_config(), PACKS[0][-1], gradients=True)
"""What two ranks' gradients of one replicated parameter may differ by, relative to their norm."""


def run_config(
    parallel: dict[str, Any],
    train: dict[str, Any] | None = None,
    documents: Sequence[Sequence[int]] = PACKS,
    **model: Any,
) -> Config:
    """A configuration of the mesh tests."""
    config = Config()
    config.model = model_config(**model)
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    for name, value in (train or {}).items():
        setattr(config.train, name, value)
    config.train.global_batch_size = len(documents)
    config.data.seq_length = documents[0][-1]
    return config


def packs(step: int = 0, vocab: int = 104, documents: Sequence[Sequence[int]] = PACKS) -> list[PackedSample]:
    """The global batch of ``step``: targets across a document's end are masked, and a few more."""
    generator = torch.Generator().manual_seed(100 + step)
    batch = []
    for bounds in documents:
        text = torch.randint(0, vocab, (bounds[-1] + 1,), generator=generator)
        mask = torch.ones(bounds[-1])
        mask[torch.tensor(bounds[1:]) - 1] = 0.0
        batch.append(PackedSample(text[:-1], text[1:], mask, torch.tensor(bounds, dtype=torch.int32)))
    return batch


def start(config: Config, world_size: int, objective: Objective | None = None) -> TrainedModel:
    """Resolve ``config`` and build a rank's share of the model and its optimizer."""
    resolved = resolve(config, world_size, has_gpu=False)
    grid = mesh.initialise(resolved.parallel, seed=resolved.train.seed)
    return build_trained_model(resolved, grid, objective=objective)


def my_share(trained: TrainedModel, batch: list[PackedSample]) -> list[PackedSample]:
    """This data-parallel rank's micro-batches, dealt in turn."""
    return batch[trained.mesh.data_parallel_rank :: trained.mesh.data_parallel_size]


def global_name(trained: TrainedModel, chunk: Any, name: str) -> str:
    """Name with the layer's and the expert's index over the whole model."""
    parts = name.removeprefix("module.").split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(chunk.module.decoder.layers[int(parts[at])].layer_number - 1)
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        held = chunk.config.num_moe_experts // trained.mesh.groups.ep.size()
        parts[at] = str(int(parts[at]) + held * trained.mesh.groups.ep.rank())
    return ".".join(parts)


def local_parts(trained: TrainedModel, read: str) -> dict[str, Part]:
    """Every parameter of this rank ("data") or its reduced gradient ("main_grad"), by global name."""
    parts = {}
    for chunk in trained.chunks:
        for name, parameter in chunk.named_parameters():
            group = trained.mesh.groups.expt_tp if ".experts." in name else trained.mesh.groups.tp
            split = getattr(parameter, "tensor_model_parallel", False) and group.size() > 1
            value = getattr(parameter, read).detach().float().clone()
            dim = parameter.partition_dim if split else -1
            parts[global_name(trained, chunk, name)] = Part(value, group.rank(), group.size(), dim)
    return parts


def assemble(by_rank: list[dict[str, Part]]) -> dict[str, Tensor]:
    """Put the ranks' parts together; copies of a part must be the same but for rounding."""
    pieces: dict[str, dict[int, Part]] = {}
    for parts in by_rank:
        for name, part in parts.items():
            slot = part.tp_rank if part.dim >= 0 else 0
            known = pieces.setdefault(name, {}).setdefault(slot, part)
            assert (part.value - known.value).norm() <= COPIES * known.value.norm(), name
    whole = {}
    for name, slots in pieces.items():
        values = [slots[rank].value for rank in sorted(slots)]
        dim = slots[0].dim
        if dim < 0:
            whole[name] = values[0]
        elif name.endswith("linear_fc1.weight"):
            # each part is its rows of w1, then its rows of w3
            whole[name] = torch.cat([v.chunk(2)[0] for v in values] + [v.chunk(2)[1] for v in values])
        else:
            whole[name] = torch.cat(values, dim=dim)
    return whole


def gradients_and_trace(
    rank: int,
    world_size: int,
    config: Config,
    steps: int,
    documents: Sequence[Sequence[int]] = PACKS,
    cost: ModelCost | None = None,
) -> dict[str, Any]:
    """Every gradient of one global batch, then ``steps`` optimizer steps on further batches.

    ``cost``, where given, is what layouts balance over context-parallel ranks, instead of the model's own.
    """
    trained = start(config, world_size)
    if cost is not None:
        trained.cost = cost
    first, parts = step_with_gradients(trained, packs(documents=documents))
    # Two packs a step: enough for a trace, and half of the collectives.
    trace = [train_step(trained, my_share(trained, packs(step)[:2]), lr=3e-3) for step in range(steps)]
    return {"parts": parts, "first": first, "trace": trace}


def step_with_gradients(trained: TrainedModel, batch: list[PackedSample]) -> tuple[StepResult, dict[str, Part]]:
    """One step on a global batch, at a learning rate of 0, and every gradient of it."""
    # Otherwise only the shard that the distributed optimizer owns is reduced.
    for chunk in trained.chunks:
        chunk.config.finalize_model_grads_func = _finalize_with_all_reduce
    result = train_step(trained, my_share(trained, batch), lr=0.0)
    parts = local_parts(trained, "main_grad")
    for chunk in trained.chunks:
        chunk.config.finalize_model_grads_func = finalize_undivided
    return result, parts


def _finalize_with_all_reduce(
    model: list[Any], num_tokens: Tensor | None, pg_collection: Any = None, force_all_reduce: bool = False
) -> None:
    finalize_undivided(model, num_tokens, pg_collection=pg_collection, force_all_reduce=True)


def router_gradient(rank: int, world_size: int, config: Config, masked: int) -> Tensor:
    """Gradient of the last layer's router after one batch whose packs have their first ``masked`` targets masked.

    The last router's: what follows it in the model does not depend on other routers' aux losses.
    """
    config.optimizer.clip_grad = 0.0  # clipping would scale the gradient that is read below
    trained = start(config, world_size)
    batch = my_share(trained, packs())
    for sample in batch:
        sample.loss_mask[:masked] = 0.0
    train_step(trained, batch, lr=0.0)
    gradient: Tensor = trained.chunks[0].module.decoder.layers[-1].mlp.router.weight.main_grad.clone()
    return gradient
