"""The chunked vocabulary-parallel loss against whole logits in float64: loss, both gradients, and what it allocates.

Tolerance: root-mean-square error at most twice that of the same whole logits in the head's own precision, by torch.
Both round the same products and sums, in other orders.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_m1.parallel.vocab_head import vocab_logits, vocab_parallel_choice, vocab_parallel_loss
from megatron_m1.runtime.pool import WorkerPool

FACTOR = 2.0


@dataclass(frozen=True)
class Case:
    """One head and its tokens."""

    tokens: int = 66
    width: int = 33
    vocab: int = 42
    chunk_bytes: int = 1300
    scale: float = 0.3
    """Of the hidden values: logits are about ``scale * sqrt(width)``."""
    offset: float = 0.0
    """Added to every logit, which then is exact in fp32: what is left is the error of the softmax."""
    hidden_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    only_last: bool = False
    """All labels in the last seventh of the vocabulary: on one rank."""

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden [T, D], weight [V, D], labels [T], some of them -100, and the loss's gradient [T], some of it 0."""
        generator = torch.Generator().manual_seed(self.tokens + self.vocab)
        hidden = torch.randn(self.tokens, self.width, generator=generator) * self.scale
        weight = torch.randn(self.vocab, self.width, generator=generator)
        if self.offset:
            hidden, weight = (x.mul(4).round().div(4) for x in (hidden, weight))
            hidden[:, 0], weight[:, 0] = self.offset / 64, 64.0
        first = self.vocab - self.vocab // 7 if self.only_last else 0
        labels = torch.randint(first, self.vocab, (self.tokens,), generator=generator)
        labels[torch.arange(self.tokens) % 11 == 5] = -100
        grad = torch.rand(self.tokens, generator=generator)
        grad[torch.arange(self.tokens) % 7 == 3] = 0.0
        return hidden.to(self.hidden_dtype), weight.to(self.weight_dtype), labels, grad


CASES = {
    "odd-chunks": Case(),
    "one-chunk": Case(chunk_bytes=2**20),
    "a-token-a-chunk": Case(chunk_bytes=1),
    "labels-on-one-rank": Case(only_last=True),
    "logits-of-1e4": Case(scale=1e4 / 33**0.5),
    "logits-near-1e4": Case(offset=1e4),
    "large-products": Case(tokens=516, width=129, vocab=258, chunk_bytes=300_000),
    "bf16-hidden": Case(hidden_dtype=torch.bfloat16),
    "bf16-head": Case(hidden_dtype=torch.bfloat16, weight_dtype=torch.bfloat16),
    "bf16-head-logits-of-1e4": Case(
        hidden_dtype=torch.bfloat16, weight_dtype=torch.bfloat16, scale=1e4 / 33**0.5, chunk_bytes=2**20
    ),
}


def whole_logits(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients of hidden and weight, with products in ``dtype`` and the rest in fp32 or wider."""
    *leaves, labels, grad = case.inputs()
    hidden, weight = (leaf.detach().requires_grad_() for leaf in leaves)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    wide = torch.promote_types(dtype, torch.float32)
    loss = cross_entropy(logits.to(wide), labels, reduction="none")
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), grad.to(wide))]


def truth(case: Case) -> list[Tensor]:
    """Loss and gradients in float64."""
    *leaves, labels, grad = case.inputs()
    hidden, weight = (leaf.double().requires_grad_() for leaf in leaves)
    loss = cross_entropy(hidden @ weight.t(), labels, reduction="none")
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), grad.double())]


def assert_as_exact_as_torch(case: Case, ours: list[Tensor]) -> None:
    names, torchs = ("loss", "hidden", "weight"), whole_logits(case, case.weight_dtype)
    for name, value, exact, other in zip(names, ours, truth(case), torchs, strict=True):
        assert value.shape == exact.shape and value.dtype == other.dtype, name
        error, allowed = ((x.double() - exact).square().mean().sqrt().item() for x in (value, other))
        assert error <= FACTOR * allowed, f"{name}: error {error}, torch's {allowed}"


class Allocations(TorchDispatchMode):
    """Measures the memory that operations hand out: the largest tensor, and the most that is alive together."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.largest_elements = self.live_bytes = self.peak_bytes = 0
        self._addresses = {tensor.data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._record(leaf)
        return out

    def _record(self, tensor: Tensor) -> None:
        self.largest_elements = max(self.largest_elements, tensor.numel())
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or storage.data_ptr() in self._addresses:
            return
        self._addresses.add(storage.data_ptr())
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(tensor, self._free, storage.data_ptr(), storage.nbytes())

    def _free(self, address: int, size: int) -> None:
        self._addresses.discard(address)
        self.live_bytes -= size


def chunked(case: Case, group: dist.ProcessGroup) -> tuple[list[Tensor], Allocations]:
    """This rank's loss [T], gradients of its tokens and of its rows, and what was allocated for them."""
    rank, ranks = group.rank(), group.size()
    hidden, weight, labels, grad = case.inputs()
    hidden, weight = (leaf.chunk(ranks)[rank].clone().requires_grad_() for leaf in (hidden, weight))
    with Allocations(hidden, weight, labels, grad) as allocations:
        loss = vocab_parallel_loss(hidden, weight, labels, group=group, chunk_bytes=case.chunk_bytes, ieee_fp32=True)
        loss.backward(grad)
    assert hidden.grad is not None and weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad], allocations


@pytest.mark.parametrize("name", CASES)
def test_one_rank_is_as_exact_as_whole_logits(name: str, alone: dist.ProcessGroup, nan_memory: None) -> None:
    odd = replace(CASES[name], tokens=CASES[name].tokens - 1)
    assert_as_exact_as_torch(odd, chunked(odd, alone)[0])


def every_case(rank: int, world_size: int) -> list[tuple[list[Tensor], int]]:
    """Results of all cases on this rank, and the elements of the largest tensor."""
    assert dist.group.WORLD is not None
    runs = [chunked(case, dist.group.WORLD) for case in CASES.values()]
    return [(results, allocations.largest_elements) for results, allocations in runs]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_are_as_exact_as_whole_logits(world_size: int, workers: WorkerPool) -> None:
    by_rank = workers.run(every_case, world_size=world_size)
    for index, (name, case) in enumerate(CASES.items()):
        parts = [results for results, _ in (rank[index] for rank in by_rank)]
        for loss, _, _ in parts:
            assert torch.equal(loss, parts[0][0]), name
        together = [parts[0][0], torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])]
        assert_as_exact_as_torch(case, together)


def chosen(case: Case, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, int]:
    """Loss and most likely token of every token, and the elements of the largest tensor."""
    rank, ranks = group.rank(), group.size()
    hidden, weight, labels, _ = case.inputs()
    hidden, weight = (leaf.chunk(ranks)[rank].clone() for leaf in (hidden, weight))
    with Allocations(hidden, weight, labels) as allocations:
        loss, choice = vocab_parallel_choice(
            hidden, weight, labels, group=group, chunk_bytes=case.chunk_bytes, ieee_fp32=True
        )
    return loss, choice, allocations.largest_elements


def assert_likeliest(case: Case, loss: Tensor, choice: Tensor, trained: Tensor) -> None:
    """The loss is training's, bit for bit; no logit is above the chosen one's by more than the products' rounding."""
    assert torch.equal(loss, trained)
    assert choice.dtype == torch.int64
    hidden, weight, _, _ = case.inputs()
    exact = hidden.double() @ weight.double().t()
    behind = exact.max(dim=1).values - exact.gather(1, choice[:, None])[:, 0]
    dtype = case.weight_dtype
    assert float((behind / exact.abs().max()).max()) <= 4 * torch.finfo(dtype).eps


def every_choice(rank: int, world_size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of all cases: loss, choice, and the loss of training."""
    assert dist.group.WORLD is not None
    group = dist.group.WORLD
    return [(*chosen(case, group)[:2], chunked(case, group)[0][0]) for case in CASES.values()]


@pytest.mark.parametrize("name", CASES)
def test_one_rank_chooses_the_most_likely_token(name: str, alone: dist.ProcessGroup, nan_memory: None) -> None:
    case = CASES[name]
    loss, choice, _ = chosen(case, alone)
    assert_likeliest(case, loss, choice, chunked(case, alone)[0][0])


def test_ranks_together_choose_the_most_likely_token(workers: WorkerPool) -> None:
    by_rank = workers.run(every_choice, world_size=2)
    for index, case in enumerate(CASES.values()):
        loss, choice, trained = by_rank[0][index]
        assert torch.equal(choice, by_rank[1][index][1]) and torch.equal(loss, by_rank[1][index][0])
        assert_likeliest(case, loss, choice, trained)


def first_of_equals(rank: int, world_size: int) -> list[int]:
    """Choices where rows 2, 3 and 5 of six are the same and the largest, for tokens of both signs."""
    assert dist.group.WORLD is not None
    weight = torch.tensor([[1.0], [-1.0], [2.0], [2.0], [-1.0], [2.0]]).chunk(world_size)[rank]
    hidden = torch.tensor([[1.0], [-1.0]]).chunk(world_size)[rank]
    _, choice = vocab_parallel_choice(
        hidden, weight, torch.tensor([0, -100]), group=dist.group.WORLD, chunk_bytes=1, ieee_fp32=True
    )
    return choice.tolist()


def test_of_equals_the_first_is_chosen_on_every_mesh(workers: WorkerPool) -> None:
    for world_size in (1, 2):
        assert workers.run(first_of_equals, world_size=world_size) == [[2, 1]] * world_size


def test_choosing_needs_one_chunk_of_logits(alone: dist.ProcessGroup) -> None:
    _, _, largest = chosen(WIDE, alone)
    assert largest * 4 <= WIDE.chunk_bytes < WIDE.tokens * WIDE.vocab * 4


WIDE = Case(tokens=240, width=4, vocab=996, chunk_bytes=100_000)
"""Logits of 956 kB; all else is small: the weight has 16 kB, the tokens 4 kB."""


def largest_and_peak(rank: int, world_size: int, case: Case) -> tuple[int, int]:
    assert dist.group.WORLD is not None
    _, allocations = chunked(case, dist.group.WORLD)
    return allocations.largest_elements, allocations.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_logits_of_the_sequence_never_exist(world_size: int, dtype: torch.dtype, workers: WorkerPool) -> None:
    case = replace(WIDE, weight_dtype=dtype, hidden_dtype=dtype)
    sequence = case.tokens * case.vocab // world_size
    beside = 4 * 4 * case.vocab * case.width  # the weight's gradient, a chunk's share of it, and what is smaller
    assert case.chunk_bytes + beside < 2 * 0.95 * case.chunk_bytes, "two chunks would be seen"
    for largest, peak in workers.run(largest_and_peak, case, world_size=world_size):
        assert largest * 4 <= case.chunk_bytes < sequence * 4
        assert 0.6 * case.chunk_bytes < peak < case.chunk_bytes + beside


def test_whole_logits_would_be_seen() -> None:
    inputs = WIDE.inputs()
    with Allocations(*inputs) as allocations:
        whole_logits(WIDE, torch.float32)
    assert allocations.largest_elements == WIDE.tokens * WIDE.vocab
    assert allocations.peak_bytes > 4 * WIDE.tokens * WIDE.vocab


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_is_added_to_main_grad(dtype: torch.dtype, alone: dist.ProcessGroup) -> None:
    """In fp32, over two backward passes, together with that of whole logits in one of them."""
    case = Case(hidden_dtype=dtype, weight_dtype=dtype)
    hidden, weight, labels, grad = case.inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    weight.main_grad = torch.ones(weight.shape)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def loss() -> Tensor:
        return vocab_parallel_loss(hidden, weight, labels, group=alone, chunk_bytes=case.chunk_bytes, ieee_fp32=True)

    once = loss()
    once.backward(grad, retain_graph=True)
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    once.backward(grad)  # the kept chunk is gone by now
    logits = vocab_logits(hidden, weight, ieee_fp32=True)
    ((loss() + cross_entropy(logits.float(), labels, reduction="none")) * grad).sum().backward()
    main_grad = weight.main_grad  # type: ignore[attr-defined]
    assert main_grad.dtype == torch.float32
    expected = 4.0 * truth(case)[2]
    error = (main_grad.double() - 1.0 - expected).norm() / expected.norm()
    # A few roundings of logits and products to ``dtype``; a gradient too few or too many is an error of 0.25.
    assert error < 8 * torch.finfo(dtype).eps


class Switches(TorchDispatchMode):
    """What the TF32 switch says at every product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            self.seen.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    """TF32 switched on in the process."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(("ieee_fp32", "expected"), [(True, "ieee"), (False, "tf32")])
def test_tf32_in_every_product(ieee_fp32: bool, expected: str, alone: dist.ProcessGroup, tf32_allowed: None) -> None:
    hidden, weight, labels, grad = Case(chunk_bytes=6000).inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    with Switches() as switches:
        loss = vocab_parallel_loss(hidden, weight, labels, group=alone, chunk_bytes=6000, ieee_fp32=ieee_fp32)
        loss.backward(grad)
        vocab_logits(hidden, weight, ieee_fp32=ieee_fp32).sum().backward()
    # Two chunks forward, one of them made again, two products each for the gradients; then one and two.
    assert switches.seen == [expected] * (2 + 1 + 4 + 3)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_autocast_does_not_reach_the_products(alone: dist.ProcessGroup) -> None:
    case = CASES["odd-chunks"]
    expected, _ = chunked(case, alone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = chunked(case, alone)
    assert all(torch.equal(ours, other) for ours, other in zip(found, expected, strict=True))


def test_bad_input(alone: dist.ProcessGroup) -> None:
    hidden, weight, labels, _ = Case().inputs()
    with pytest.raises(ValueError, match=r"labels have shape \(65,\): give one for each of 1 x 66 tokens"):
        vocab_parallel_loss(hidden, weight, labels[1:], group=alone, chunk_bytes=1, ieee_fp32=True)
    with pytest.raises(ValueError, match="chunk_bytes is 0"):
        vocab_parallel_loss(hidden, weight, labels, group=alone, chunk_bytes=0, ieee_fp32=True)
