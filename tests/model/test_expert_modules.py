"""Experts in token groups under DDP, and those of any module through autograd, as transformer-engine's are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_m1.config import Config
from megatron_m1.kernels.expert_mlp.naive import naive_expert_mlp
from megatron_m1.layers.experts import ThroughAutograd
from megatron_m1.parallel.expert.layer import Call, Experts, expert_layer
from megatron_m1.parallel.expert.links import Links
from megatron_m1.parallel.expert.plan import Ranks, plan_exchange
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.step import compute_gradients
from tests.model.meshes import packs, run_config, start
from tests.parallel.expert.ranks import Case, Outcome
from tests.parallel.expert.test_layer import TOLERANCE, compare

BF16_SUMS = 2.0**-8
"""Relative; one rounding to bf16, as both have: groups change no bit of anything else."""


class GroupedModule(nn.Module):
    """What megatron-core calls experts: tokens sorted by expert, their numbers, their probabilities."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, tokens: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        sizes, pairs = counts.tolist(), list(self.weights)
        parts = zip(tokens.split(sizes), probs.split(sizes), pairs[::2], pairs[1::2], strict=True)
        return torch.cat([naive_expert_mlp(*part) for part in parts]), None


def outcome(case: Case) -> Outcome:
    hidden, probs, chosen, grad = case.inputs(0)
    module = GroupedModule(case.weights())
    weights = list(module.parameters())
    leaves = [hidden.requires_grad_(), probs.requires_grad_(), *weights]
    experts: Experts = ThroughAutograd(module)
    call = Call(plan_exchange(chosen, case.groups, Ranks(None, None, None)), Links(None, None), experts, case.recompute)
    output = expert_layer(hidden, probs, weights, call)
    grads = torch.autograd.grad(output, leaves, grad)
    return Outcome(output.detach(), grads[0], grads[1], list(grads[2:]))


def test_groups_of_a_module_compute_what_the_formula_says() -> None:
    for recompute in (False, True):
        for to_one in (False, True):
            case = Case(1, 1, 3, (17,), recompute=recompute, to_one=to_one)
            compare(case, [outcome(case)], TOLERANCE)


def experts_sums(rank: int, world_size: int, config: Config) -> tuple[list[Tensor], bool]:
    """DDP's sums of the experts' gradients over the global batch; whether all were added there by the layer."""
    trained = start(config, world_size)
    compute_gradients(trained, packs())
    weights = [weight for name, weight in trained.chunks[0].named_parameters() if ".experts." in name]
    assert all(weight.grad is None for weight in weights)
    return [weight.main_grad.clone() for weight in weights], all(weight.grad_added_to_main_grad for weight in weights)


def test_groups_add_to_the_sums_of_ddp(workers: WorkerPool) -> None:
    """In bf16, over several micro-batches: once, and in fp32."""
    (one, is_one_added), (four, is_added) = (
        workers.run(experts_sums, run_config({"moe_token_groups": groups}, {"precision": "bf16"}), world_size=1)[0]
        for groups in (1, 4)
    )
    assert (is_one_added, is_added) == (False, True)
    for found, wanted in zip(four, one, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() <= BF16_SUMS * wanted.norm()


def optimizer_shares(rank: int, world_size: int, config: Config) -> tuple[list[tuple[int, int]], dict[bool, int]]:
    """Of every optimizer of this rank its ranks and how many numbers it holds; numbers of others, and of experts."""
    trained = start(config, world_size)
    shares = [
        (
            part.data_parallel_group.size(),
            sum(p.numel() for group in part.optimizer.param_groups for p in group["params"]),
        )
        for part in trained.optimizer.chained_optimizers
    ]
    counts = {False: 0, True: 0}
    for name, parameter in trained.chunks[0].named_parameters():
        counts[".experts." in name] += parameter.numel()
    return shares, counts


def test_experts_have_a_sharded_optimizer_of_their_own(workers: WorkerPool) -> None:
    """Four ranks share what all have, two ranks each half of the experts; nothing is held twice."""
    config = run_config({"context_parallel_size": 2, "expert_model_parallel_size": 2})
    found = workers.run(optimizer_shares, config, world_size=4)
    assert all([ranks for ranks, _ in shares] == [4, 2] for shares, _ in found)
    dense, experts = (sum(shares[place][1] for shares, _ in found) for place in (0, 1))
    assert dense == found[0][1][False]
    assert experts == 2 * found[0][1][True]
