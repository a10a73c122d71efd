"""Norms of the gradient by kind of parameter and by depth: figures of a step's record."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn
from torch import distributed as dist

from megatron_m1.layers.registry import layer_kinds
from megatron_m1.layers.router import Router
from megatron_m1.shapes.registry import layer_ffns, layer_mixers
from megatron_m1.training.figures import Figure
from megatron_m1.training.trained_model import TrainedModel

EIGHTHS = 8
"""Groups of layers by depth, as equal as they can be; a model of fewer layers has fewer groups."""
OUTSIDE = EIGHTHS
"""Column of what belongs to no layer."""

type Place = tuple[str, int]
"""Kind of parameter, and the eighth of the layers that it lies in (or ``OUTSIDE``)."""


def gradient_norms(trained: TrainedModel) -> dict[Figure, float]:
    """Norms of the gradient that the optimizer is about to take, before clipping. Collective: one all-reduce.

    Every number of the gradient counts once, whatever shards or copies of its parameter there are: the squares of the
    kinds add up to that of the whole gradient's norm, and so do those of the eighths with what is outside the layers.

    Args:
        trained: its optimizer's ``prepare_grads`` has been called.

    Returns:
        By kind (embedding, head, norms, the mixers of the model, router, experts), by eighth of the layers, and of each
        mixer by eighth. A kind without parameters is left out. The same on every rank.
    """
    model = trained.chunks[0].config.model
    mixers = list(dict.fromkeys(layer_mixers(model)))
    kinds = ["embedding", "head", "norms", *mixers, "router", "experts", *dict.fromkeys(layer_ffns(model))]
    kinds = list(dict.fromkeys(kinds))
    # Squares, and how many numbers they are of: [2, kinds, eighths and outside].
    cells = torch.zeros(2, len(kinds), EIGHTHS + 1, dtype=torch.float64, device=trained.mesh.device)
    found = list(_counted_gradients(trained))
    if found:
        rows, columns = zip(*((kinds.index(kind), column) for (kind, column), _ in found), strict=True)
        index = torch.tensor([rows, columns], device=cells.device)
        squares = torch.stack([gradient.float().norm().double().square() for _, gradient in found])
        sizes = torch.tensor([gradient.numel() for _, gradient in found], dtype=torch.float64, device=cells.device)
        for cell, values in ((cells[0], squares), (cells[1], sizes)):
            cell.index_put_((index[0], index[1]), values, accumulate=True)
    dist.all_reduce(cells)
    return _figures(cells.cpu(), kinds, mixers)


def _figures(cells: Tensor, kinds: list[str], mixers: list[str]) -> dict[Figure, float]:
    squares, sizes = cells
    by_kind = {f"grad_norm_{kind}": (squares[row], sizes[row]) for row, kind in enumerate(kinds)}
    by_depth = {f"grad_norm_eighth_{n + 1}": (squares[:, n], sizes[:, n]) for n in range(EIGHTHS)}
    by_both = {
        f"grad_norm_{mixer}_eighth_{n + 1}": (squares[kinds.index(mixer), n], sizes[kinds.index(mixer), n])
        for mixer in mixers
        for n in range(EIGHTHS)
    }
    groups = by_kind | by_depth | by_both
    return {Figure(name, ""): float(part.sum().sqrt()) for name, (part, size) in groups.items() if bool(size.sum() > 0)}


def _counted_gradients(trained: TrainedModel) -> Iterator[tuple[Place, Tensor]]:
    """This rank's shards of the gradient that megatron-core's own norm is of, with what they belong to."""
    places = {parameter: place for chunk in trained.chunks for parameter, place in _places(chunk).items()}
    for part in trained.optimizer.chained_optimizers:
        assert isinstance(part, DistributedOptimizer)
        if part.is_stub_optimizer:
            continue
        # A copy on a further tensor-parallel rank is left out; known by identity, because shards have no names.
        counted = {id(gradient) for gradient in part.get_grads_for_grad_norm()}
        parameters = chain.from_iterable((*part.model_fp32_groups, *part.model_float16_groups))
        shards = chain.from_iterable((*part.shard_fp32_groups, *part.shard_fp32_from_float16_groups))
        for parameter, shard in zip(parameters, shards, strict=True):
            if id(shard.grad) in counted:
                yield places[parameter], shard.grad


def _places(chunk: nn.Module) -> dict[nn.Parameter, Place]:
    """Every parameter of a pipeline chunk; the norms are those between sub-layers and the last one."""
    model = get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)
    of_chunk = {"embedding": getattr(model, "embedding", None), "head": getattr(model, "output_layer", None)}
    places = dict.fromkeys(model.parameters(), ("norms", OUTSIDE))
    for kind, module in of_chunk.items():
        if module is not None:
            places |= dict.fromkeys(module.parameters(), (kind, OUTSIDE))
    mixers, ffns = layer_mixers(model.config.model), layer_ffns(model.config.model)
    eighths = torch.arange(len(mixers)).tensor_split(min(EIGHTHS, len(mixers)))
    eighth_of = [eighth for eighth, layers in enumerate(eighths) for _ in layers]
    for layer in model.decoder.layers:
        index = layer.layer_number - 1
        eighth = eighth_of[index]
        _, ffn = layer_kinds(model.config.model)[index]
        places |= dict.fromkeys(layer.parameters(), ("norms", eighth))
        places |= dict.fromkeys(layer.self_attention.parameters(), (mixers[index], eighth))
        places |= dict.fromkeys(layer.mlp.parameters(), (ffns[index], eighth))
        places |= dict.fromkeys(ffn.expert_parameters(layer.mlp), ("experts", eighth))
        for module in layer.mlp.modules():
            if isinstance(module, Router):
                places |= dict.fromkeys(module.parameters(), ("router", eighth))
    return places
