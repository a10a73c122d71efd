"""What balances the experts, on meshes against one process: global aux loss, z-loss, sigmoid scores with a bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.config import Config
from megatron_m1.data.packed import PackedSample
from megatron_m1.layers.router import Router
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.step import AUX_LOSS, GRAD_NORM, LOSS, train_step
from tests.model.meshes import COPIES, assemble, packs, router_gradient, run_config, start, step_with_gradients
from tests.model.partitions import joined

CP, TP, EP, PP, G = (
    "context_parallel_size",
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    "pipeline_model_parallel_size",
    "moe_token_groups",
)
SIGMOID: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.125,  # a power of two: sums of it are exact
}
KINDS: dict[str, dict[str, Any]] = {
    "global": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.5},
    "z-loss": {"moe_z_loss_coeff": 0.05},
    "bias": SIGMOID | {"moe_router_load_balancing_type": "none"},
    "bias with a little loss": SIGMOID,
}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-ep2": (2, {TP: 2, EP: 2}),
    "cp3": (3, {CP: 3}),
    "cp2-pp2": (4, {CP: 2, PP: 2}),
    "dp2-ep2-groups": (2, {EP: 2, G: 2}),
}


def biases(trained: Any) -> dict[int, Tensor]:
    """Of every layer that has one, by number."""
    return {
        layer.layer_number: layer.mlp.router.expert_bias.clone()
        for chunk in trained.chunks
        for layer in chunk.module.decoder.layers
        if isinstance(layer.mlp.router, Router) and layer.mlp.router.expert_bias is not None
    }


def outcome(rank: int, world_size: int, config: Config, batch: list[PackedSample]) -> Any:
    """Two steps with every gradient; the second one chooses by the bias that the first one left."""
    config.optimizer.clip_grad = 0.0  # every rank would clip its own shard of the gradients that are compared
    trained = start(config, world_size)
    step_with_gradients(trained, batch)
    first = biases(trained)
    result, parts = step_with_gradients(trained, batch)
    return {"result": result, "parts": parts, "biases": (first, biases(trained))}


def compare(by_rank: list[Any], truth: Any) -> None:
    expected = assemble([truth["parts"]])
    gradients = assemble([result["parts"] for result in by_rank])
    assert gradients.keys() == expected.keys()
    for key, wanted in expected.items():
        error = ((gradients[key] - wanted).norm() / wanted.norm()).item()
        assert error <= COPIES, f"{key}: {error}"
    for result in by_rank:
        for figure in (LOSS, AUX_LOSS, GRAD_NORM):
            value = truth["result"].figures[figure]
            assert result["result"].figures[figure] == pytest.approx(value, rel=COPIES), figure.name
        for after, wanted_after in zip(result["biases"], truth["biases"], strict=True):
            for layer, bias in after.items():
                assert torch.equal(bias, wanted_after[layer])
        assert all(bias.abs().max() > 0 for bias in result["biases"][0].values())


def after_a_bad_step(rank: int, world_size: int, config: Config) -> tuple[bool, dict[int, Tensor]]:
    """Routers choose as ever, but the loss is not finite."""
    trained = start(config, world_size)
    trained.chunks[0].module.decoder.final_layernorm.weight.data.fill_(torch.nan)
    return train_step(trained, packs(), lr=1e-3).updated, biases(trained)


def test_a_skipped_step_leaves_the_bias(workers: WorkerPool) -> None:
    ((updated, found),) = workers.run(after_a_bad_step, run_config({}, **KINDS["bias"]), world_size=1)
    assert not updated
    assert found
    assert not any(bias.any() for bias in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_meshes_agree_with_one_process(kind: str, workers: WorkerPool) -> None:
    (truth,) = workers.run(outcome, run_config({}, **KINDS[kind]), packs(), world_size=1)
    for name, (world_size, parallel) in MESHES.items():
        if kind == "global" and name == "dp2-ep2-groups":
            continue  # ranks see other packs first: the next test
        by_rank = workers.run(outcome, run_config(parallel, **KINDS[kind]), packs(), world_size=world_size)
        compare(by_rank, truth)


def test_global_loads_are_those_of_all_data_parallel_ranks(workers: WorkerPool) -> None:
    """Two packs at once on two ranks are one pack of two on one process, whose loads are those of both."""
    by_rank = workers.run(outcome, run_config({EP: 2}, **KINDS["global"]), packs(), world_size=2)
    batch = packs()
    pairs = [joined(batch[i], batch[i + 1]) for i in (0, 2)]
    config = run_config({}, documents=[[0, 2 * len(batch[0].tokens)]] * 2, **KINDS["global"])
    (truth,) = workers.run(outcome, config, pairs, world_size=1)
    compare(by_rank, truth)


def test_global_and_local_loss_differ(workers: WorkerPool) -> None:
    """Else the tests above would hold for a global loss that is a local one."""
    config = KINDS["global"] | {"moe_router_load_balancing_type": "aux_loss"}
    (other,) = workers.run(router_gradient, run_config({}, **config), 1, world_size=1)
    (own,) = workers.run(router_gradient, run_config({}, **KINDS["global"]), 1, world_size=1)
    assert (own - other).norm() > 1e-3 * own.norm()


def logits_of(rank: int, world_size: int, config: Config) -> Any:
    """The last router's gradient with and without z-loss, its input and its weight."""
    taken: list[Tensor] = []

    def keep(module: Router, arguments: tuple[Tensor, ...]) -> None:
        taken.append(arguments[0].detach().flatten(0, 1))

    config.optimizer.clip_grad = 0.0
    trained = start(config, world_size)
    router = trained.chunks[0].module.decoder.layers[-1].mlp.router
    router.register_forward_pre_hook(keep)
    step_with_gradients(trained, packs())
    return router.weight.main_grad.clone(), taken, router.weight.detach().clone()


def test_z_loss_by_its_formula(workers: WorkerPool) -> None:
    """Its gradient for the last router is that of the mean square of log-sum-exp, averaged over packs."""
    coefficient = 0.5
    (with_loss, inputs, weight), (without, _, _) = (
        workers.run(logits_of, run_config({}, moe_z_loss_coeff=value), world_size=1)[0] for value in (coefficient, None)
    )
    leaf = weight.double().requires_grad_()
    packs_losses = [(x.double() @ leaf.t()).exp().sum(1).log().square().mean() for x in inputs]
    (expected,) = torch.autograd.grad(coefficient * torch.stack(packs_losses).mean(), leaf)
    assert ((with_loss - without).double() - expected).norm() <= 1e-4 * expected.norm()


Seen = list[tuple[Tensor, Tensor, Tensor]]


def two_steps(rank: int, world_size: int, config: Config) -> tuple[Tensor, Tensor, Seen, Seen]:
    """The last router's weight, its bias after the first step, and by pack its input, probabilities and choices."""
    seen: Seen = []

    def keep(module: Router, arguments: tuple[Tensor, ...], found: tuple[Tensor, Tensor]) -> None:
        seen.append((arguments[0].detach().flatten(0, 1), found[0].detach(), found[1].detach()))

    trained = start(config, world_size)
    router = trained.chunks[0].module.decoder.layers[-1].mlp.router
    router.register_forward_hook(keep)
    step_with_gradients(trained, packs())
    bias = router.expert_bias.clone()
    step_with_gradients(trained, packs())
    return router.weight.detach().clone(), bias, seen[:4], seen[4:]


def test_the_bias_by_its_formula(workers: WorkerPool) -> None:
    """DeepSeek-V3's: raised where fewer tokens came than the mean; it chooses, and weighs nothing."""
    ((weight, bias, first, second),) = workers.run(two_steps, run_config({}, **KINDS["bias"]), world_size=1)
    counts = torch.stack([chosen.sum(0) for _, _, chosen in first]).sum(0).float()
    assert torch.equal(bias, SIGMOID["moe_router_bias_update_rate"] * (counts.mean() - counts).sign())
    for x, probs, chosen in second:
        scores = (x @ weight.t()).sigmoid()
        wanted = torch.zeros_like(chosen).scatter_(1, (scores + bias).topk(2).indices, True)
        assert torch.equal(chosen, wanted)
        shares = scores * chosen
        torch.testing.assert_close(probs, shares / shares.sum(1, keepdim=True))
