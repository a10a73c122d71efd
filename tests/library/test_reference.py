"""The library against transformers: every answer of a model, alone, beside another one and in any surroundings."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import cross_entropy

import megatron_m1
from benchmarks.common.transformers_weights import expected
from megatron_m1.data.packed import PackedSample
from megatron_m1.library.inputs import PASS_TOKENS
from megatron_m1.runtime import cpu
from tests.library.conftest import Reference
from tests.tolerances import of_largest, whole_model

LENGTHS = (1, 40, 7, 130)


@pytest.fixture(scope="module")
def model(reference: Reference) -> megatron_m1.Model:
    return megatron_m1.load(reference.folder)


@pytest.fixture(scope="module")
def second(other: Reference) -> megatron_m1.Model:
    return megatron_m1.load(other.folder, device="cpu", dtype="fp32")


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    assert not dist.is_initialized(), "no process group is left"
    assert not cpu.is_installed(), "torch.cuda is as it was"


def sequences(vocabulary: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def truth(reference: Reference, ids: list[int]) -> Tensor:
    """Logits of one document alone, [n, vocabulary]."""
    with torch.no_grad():
        logits: Tensor = reference.model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def pack_of(documents: list[list[int]]) -> PackedSample:
    """Documents end to end; the labels across a document's end are masked, and far beyond the vocabulary."""
    bounds = torch.tensor([0, *(len(ids) for ids in documents)]).cumsum(0).int()
    tokens = torch.tensor([token for ids in documents for token in ids])
    labels, mask = tokens.roll(-1), torch.ones(len(tokens))
    mask[bounds[1:].long() - 1] = 0.0
    return PackedSample(tokens, labels.where(mask != 0, 10**6), mask, bounds)


def assert_close(ours: Tensor, theirs: Tensor, model: megatron_m1.Model) -> None:
    """Equal but for rounding, relative to the largest entry."""
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    allowed = of_largest(whole_model(model.config.model, max(LENGTHS)), theirs.numel())
    assert (ours - theirs).abs().max() <= allowed * theirs.abs().max()


def test_logits_of_every_form(model: megatron_m1.Model, reference: Reference) -> None:
    documents = sequences(99)
    right = [truth(reference, ids) for ids in documents]
    for ours, theirs in zip(model.logits(documents), right, strict=True):
        assert_close(ours, theirs, model)
    for ids, theirs in zip(documents, right, strict=True):
        assert_close(model.logits(ids), theirs, model)
        assert_close(model.logits(torch.tensor(ids)), theirs, model)
    assert_close(model.logits(torch.tensor([documents[1], documents[1]])), torch.stack([right[1]] * 2), model)
    pack = pack_of(documents)
    assert_close(model.logits(pack), torch.cat(right), model)
    mixed = model.logits([documents[2], pack, torch.tensor(documents[1])])
    for ours, theirs in zip(mixed, [right[2], torch.cat(right), right[1]], strict=True):
        assert_close(ours, theirs, model)


def test_many_sequences_take_several_passes(model: megatron_m1.Model, reference: Reference) -> None:
    documents = sequences(99, (130,) * (PASS_TOKENS // 130 + 2))
    found = model.logits(documents)
    assert len(found) == len(documents)
    for index in (0, -4, -3, -2, -1):
        assert_close(found[index], truth(reference, documents[index]), model)
    assert_close(model.loss(documents), torch.cat(model.loss(documents, per_token=True)).mean(), model)


def test_losses(model: megatron_m1.Model, reference: Reference) -> None:
    documents = sequences(99)
    right = [
        cross_entropy(truth(reference, ids)[:-1], torch.tensor(ids).long()[1:], reduction="none") for ids in documents
    ]
    each = model.loss(documents, per_token=True)
    for ours, theirs in zip(each[1:], right[1:], strict=True):
        assert_close(ours, theirs, model)
    assert each[0].shape == (0,), "one token predicts none of its own"
    mean = torch.cat(right).mean()
    assert_close(model.loss(documents), mean, model)
    assert_close(model.loss(documents[1]), right[1].mean(), model)
    pack = pack_of(documents)
    ours = model.loss(pack, per_token=True)
    assert_close(ours[pack.loss_mask != 0], torch.cat(right), model)
    assert not ours[pack.loss_mask == 0].any()
    mixed: list[PackedSample | list[int]] = [pack, documents[1]]
    assert_close(model.loss(mixed), torch.cat([*right, right[1]]).mean(), model)


def test_gradients_are_those_of_transformers(reference: Reference) -> None:
    """Nothing asks for one until the module does."""
    model = megatron_m1.load(reference.folder)
    ids = sequences(99)[1]
    assert not model.loss(ids).requires_grad
    model.module.requires_grad_()
    model.loss(ids).backward()
    reference.model.zero_grad()
    logits = reference.model(torch.tensor([ids]), use_cache=False).logits[0]
    cross_entropy(logits[:-1], torch.tensor(ids[1:])).backward()
    parameters = dict(model.module.named_parameters())
    allowed = of_largest(
        whole_model(model.config.model, len(ids), gradients=True), sum(map(torch.numel, parameters.values()))
    )
    compared = 0
    for name, theirs in expected(reference.model, "grad"):
        ours = parameters[name].grad
        if theirs.any():
            assert ours is not None
            assert (ours - theirs).abs().max() <= allowed * theirs.abs().max(), name
            compared += 1
    assert compared > 20
    reference.model.zero_grad()


def test_greedy_text_is_that_of_transformers(model: megatron_m1.Model, reference: Reference) -> None:
    prompts = sequences(99, (1, 40, 7))
    generations = model.generate(prompts, max_tokens=12, chunk_tokens=16)
    with torch.no_grad():
        for prompt, ours in zip(prompts, generations, strict=True):
            theirs: Any = reference.model
            whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
            assert ours.ids == whole[0, len(prompt) :].tolist()
            assert ours.text is None
    assert model.generate(prompts[1], max_tokens=12) == generations[1]


def test_two_models_take_turns(
    model: megatron_m1.Model, second: megatron_m1.Model, reference: Reference, other: Reference
) -> None:
    """Interleaved calls, and one model asked while the other one's backward pass is still to come."""
    ours, theirs = sequences(99), sequences(77)
    alone = [model.logits(ours[1]), second.logits(theirs[1])]
    for _ in range(2):
        assert torch.equal(model.logits(ours[1]), alone[0])
        assert torch.equal(second.logits(theirs[1]), alone[1])
    assert_close(alone[0], truth(reference, ours[1]), model)
    assert_close(alone[1], truth(other, theirs[1]), second)
    second.module.requires_grad_()
    loss = second.loss(theirs[1])
    model.loss(ours[1])
    loss.backward()
    assert all(parameter.grad is None for parameter in model.module.parameters())
    second.module.zero_grad()
    second.module.requires_grad_(False)
    assert model.generate(ours[2], max_tokens=4).ids != second.generate(theirs[2], max_tokens=4).ids
    sizes = [sum(parameter.numel() for parameter in asked.module.parameters()) for asked in (model, second)]
    assert sizes == [model.parameter_counts.total, second.parameter_counts.total]
    assert repr(second) == f"<Model {other.folder}: {sizes[1]:,} parameters, float32 on cpu>"


def test_threads(model: megatron_m1.Model, second: megatron_m1.Model) -> None:
    """One thread's default process group is not taken away by another one."""
    right = {model: model.logits([1, 2, 3]), second: second.logits([1, 2, 3])}
    faults: list[BaseException | str] = []

    def ask(asked: megatron_m1.Model) -> None:
        try:
            for _ in range(10):
                if not torch.equal(asked.logits([1, 2, 3]), right[asked]):
                    faults.append("another answer")
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=ask, args=(asked,)) for asked in (model, second, model)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_a_process_group_of_the_callers_is_left_alone(model: megatron_m1.Model, reference: Reference) -> None:
    """It is started after a model was loaded, and another model is loaded meanwhile."""
    before = model.logits([1, 2, 3])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        callers = dist.group.WORLD
        assert torch.equal(model.logits([1, 2, 3]), before)
        assert torch.equal(megatron_m1.load(reference.folder).logits([1, 2, 3]), before)
        assert dist.group.WORLD is callers
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()
    assert torch.equal(model.logits([1, 2, 3]), before)


def test_bf16_keeps_router_and_head(reference: Reference) -> None:
    model = megatron_m1.load(reference.folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    fp32 = {name for name, parameter in model.module.named_parameters() if parameter.dtype == torch.float32}
    assert {re.sub(r"decoder\.layers\.\d+\.", "", name) for name in fp32} == {
        "mlp.router.weight",
        "output_layer.weight",
    }
    right = truth(reference, sequences(99)[1])
    ours = model.logits(sequences(99)[1])
    assert ours.dtype == torch.float32
    assert 1e-4 < ((ours - right).norm() / right.norm()).item() < 0.1
