"""The whole model over context-parallel ranks: the packs that go wrong most easily, and the wrongs of other systems.

Each of these silent bugs was reported of a published system, and each has a test here or elsewhere:

- one block mask for the whole pack, so that documents see each other: ``test_a_document_changes_no_other``
- a layer kind that takes its rank's tokens for the whole sequence, with a loss that still falls (in one system only
  with experts spread over ranks): ``test_the_first_token_reaches_the_last``
- bounds divided by the number of ranks, or states combined without decay or without the tokens of the own segment:
  ``tests/parallel/test_plans.py`` and ``test_lasp.py``, against token-by-token truth
- lengths rounded down to what ranks divide, the last tokens ignored: ``test_the_last_tokens_count``
- the loss averaged by rank before it is averaged over ranks, or scaled by their number: ``test_ranks_without_targets``
- the aux loss of a rank's tokens instead of the pack's: ``test_mesh_parity.py``, padding included
- rotary tables as long as a rank's tokens: ``test_positions_go_beyond_a_ranks_tokens``
- rows that no kernel writes: fresh memory is NaN in ``tests/parallel``
- states rounded to bf16 on the wire: ``test_states_are_fp32_in_a_bf16_model``
- ranks of one group that read different packs: ``test_a_group_reads_the_same_packs``
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common.context_ranks import PAIRS_ONLY
from benchmarks.common.packs import bounds_of, named_packs
from megatron_m1.config import Config
from megatron_m1.data.packed import PackedSample
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.training.expert_load import EXPERT_LOAD
from megatron_m1.training.microbatch import make_micro_batch
from megatron_m1.training.step import (
    AUX_LOSS,
    GRAD_NORM,
    LOSS,
    StepResult,
    evaluate,
    shared_micro_batches,
    train_step,
)
from tests.model.meshes import assemble, gradients_and_trace, my_share, packs, run_config, start
from tests.model.test_mesh_parity import GRADIENT_TOLERANCE

CP = "context_parallel_size"
EP = "expert_model_parallel_size"
TOKENS = 120
CHANGED = 50 * GRADIENT_TOLERANCE
"""Relative, at least; of a loss that a changed token reaches: nothing that rounding could do."""


def compare_with_one_process(ranks: int, documents: list[list[int]], workers: WorkerPool) -> None:
    """One step on these packs: loss, aux loss, gradient norm, expert load and every gradient."""
    (truth,) = workers.run(gradients_and_trace, run_config({}, documents=documents), 0, documents, world_size=1)
    expected = assemble([truth["parts"]])
    config = run_config({CP: ranks}, documents=documents)
    results = workers.run(gradients_and_trace, config, 0, documents, PAIRS_ONLY, world_size=ranks)
    found = assemble([result["parts"] for result in results])
    assert found.keys() == expected.keys()
    errors = {key: ((found[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] < GRADIENT_TOLERANCE, f"{worst}: {errors[worst]}"
    for result in results:
        found_figures, figures = (step.figures | step.routing for step in (result["first"], truth["first"]))
        for figure in (LOSS, AUX_LOSS, GRAD_NORM, EXPERT_LOAD):
            assert found_figures[figure] == pytest.approx(figures[figure], rel=GRADIENT_TOLERANCE), figure.name
        assert result["first"].weight == truth["first"].weight


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_packs_that_go_wrong_most_easily(ranks: int, workers: WorkerPool) -> None:
    documents = [*named_packs(TOKENS, ranks).values(), bounds_of([*[1] * 80, 40])]
    layout = SequenceLayout.build(documents[-1], context_parallel_size=ranks, context_parallel_rank=0, cost=PAIRS_ONLY)
    assert layout.segments_per_rank > 2
    if ranks in (2, 4):
        documents.append(bounds_of([*[3] * 20, 60]))
    compare_with_one_process(ranks, documents, workers)


@pytest.mark.parametrize("ranks", [2, 3])
def test_hundreds_of_documents(ranks: int, workers: WorkerPool) -> None:
    documents = [bounds_of([1, 2, 1] * 80 + [100])]
    compare_with_one_process(ranks, documents, workers)


def losses(rank: int, world_size: int, config: Config, samples: list[PackedSample]) -> list[float]:
    """Mean loss of each pack by itself, each with its own mask."""
    trained = start(config, world_size)
    return [evaluate(trained, [sample]).loss for sample in samples]


def one_target(sample: PackedSample, target: int, changed: int | None = None) -> PackedSample:
    """``sample`` with all targets masked but one, and perhaps one token changed."""
    tokens, mask = sample.tokens.clone(), torch.zeros_like(sample.loss_mask)
    mask[target] = 1.0
    if changed is not None:
        tokens[changed] = (tokens[changed] + 1) % 104
    return PackedSample(tokens, sample.labels, mask, sample.cu_seqlens)


@pytest.mark.parametrize("parallel", [{CP: 2}, {CP: 2, EP: 2}], ids=["cp2", "cp2-ep2"])
def test_the_first_token_reaches_the_last(parallel: dict[str, int], workers: WorkerPool) -> None:
    (sample,) = packs(documents=[[0, TOKENS]])
    pairs = [one_target(sample, TOKENS - 1), one_target(sample, TOKENS - 1, changed=0)]
    config = run_config(parallel, documents=[[0, TOKENS]])
    before, after = workers.run(losses, config, pairs, world_size=2)[0]
    (truth,) = workers.run(losses, run_config({}, documents=[[0, TOKENS]]), pairs, world_size=1)
    assert abs(truth[0] - truth[1]) > GRADIENT_TOLERANCE * truth[0]
    assert [before, after] == pytest.approx(truth, rel=GRADIENT_TOLERANCE)


def test_a_document_changes_no_other(workers: WorkerPool) -> None:
    bounds = [0, 50, 70, TOKENS]
    (sample,) = packs(documents=[bounds])
    targets = [10, 49, 50, 69, 70, TOKENS - 2]
    samples = [one_target(sample, target, changed) for target in targets for changed in (None, 55)]
    found = workers.run(losses, run_config({CP: 3}, documents=[bounds]), samples, world_size=3)[0]
    for index, target in enumerate(targets):
        before, after = found[2 * index : 2 * index + 2]
        difference = abs(before - after) / before
        if 55 <= target < 70:
            assert difference > CHANGED, target
        else:
            # Not bit by bit: routing differs in the changed document, so that experts' products have other sizes.
            assert difference < GRADIENT_TOLERANCE, target


def whole_pack_on_every_rank(rank: int, world_size: int, config: Config) -> None:
    """Call a model over context-parallel ranks with the layout of one."""
    trained, sample = start(config, world_size), packs()[0]
    params = PackedBatchParams.of(SequenceLayout.build(sample.cu_seqlens))
    trained.chunks[0](sample.tokens[None], None, None, packed_seq_params=params)


def test_a_layout_of_one_rank_is_not_taken_for_the_groups(workers: WorkerPool) -> None:
    with pytest.raises(ValueError, match="the context-parallel group has 2 ranks, the layout 1: give the same"):
        workers.run(whole_pack_on_every_rank, run_config({CP: 2}), world_size=2)


def test_the_last_tokens_count(workers: WorkerPool) -> None:
    """31 tokens on 4 ranks: the last 3 targets have a loss, and the one token of padding has none."""
    bounds = [0, 31]
    (sample,) = packs(documents=[bounds])
    samples = [one_target(sample, target) for target in (28, 29, 30)]
    found = workers.run(losses, run_config({CP: 4}, documents=[bounds]), samples, world_size=4)
    (truth,) = workers.run(losses, run_config({}, documents=[bounds]), samples, world_size=1)
    assert min(truth) > 0
    for values in found:
        assert values == pytest.approx(truth, rel=GRADIENT_TOLERANCE)


def step_with_targets(rank: int, world_size: int, config: Config, targets: int) -> StepResult:
    """One step on packs of which only the first ``targets`` targets count."""
    trained = start(config, world_size)
    batch = packs()
    for sample in batch:
        sample.loss_mask[targets:] = 0.0
    return train_step(trained, my_share(trained, batch), lr=0.0)


def test_ranks_without_targets(workers: WorkerPool) -> None:
    (truth,) = workers.run(step_with_targets, run_config({}), 11, world_size=1)
    for found in workers.run(step_with_targets, run_config({CP: 3}), 11, world_size=3):
        assert found.weight == truth.weight
        for figure in (LOSS, AUX_LOSS, GRAD_NORM):
            assert found.figures[figure] == pytest.approx(truth.figures[figure], rel=GRADIENT_TOLERANCE), figure.name


def micro_batch_facts(rank: int, world_size: int, config: Config) -> dict[str, Any]:
    """What a rank holds of the first pack of its share, and which packs those are."""
    trained = start(config, world_size)
    share = my_share(trained, packs())
    batch = make_micro_batch(
        share[1],
        trained.mesh,
        seq_length=trained.seq_length,
        pack_tokens=trained.pack_tokens,
        cost=None,
    )
    assert batch.params.layout is not None
    return {
        "first_tokens": [sample.tokens[0].item() for sample in share],
        "positions": batch.params.layout.positions,
        "tokens": batch.tokens,
        "padding": batch.padding,
    }


def test_a_group_reads_the_same_packs(workers: WorkerPool) -> None:
    facts = workers.run(micro_batch_facts, run_config({CP: 2}), world_size=4)
    first, second, third, fourth = (rank["first_tokens"] for rank in facts)
    assert first == second and third == fourth and first != third


def test_positions_go_beyond_a_ranks_tokens(workers: WorkerPool) -> None:
    facts = workers.run(micro_batch_facts, run_config({CP: 2}), world_size=2)
    assert [rank["positions"].numel() for rank in facts] == [25, 25]
    assert max(rank["positions"].max().item() for rank in facts) == 49
    assert all(rank["padding"] is None for rank in facts)


def shared_objects(rank: int, world_size: int, config: Config) -> list[bool]:
    """Whether a stage's virtual chunks are given the same objects, micro-batch by micro-batch."""
    trained = start(config, world_size)
    first, second = shared_micro_batches(trained, packs())
    return [one is other for one, other in zip(first, second, strict=True)]


def test_virtual_chunks_share_one_layout(workers: WorkerPool) -> None:
    config = run_config({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2})
    assert workers.run(shared_objects, config, world_size=2) == [[True] * len(packs())] * 2


def bf16_states(rank: int, world_size: int) -> tuple[torch.dtype, Tensor, Tensor]:
    """dtype of the states that enter this rank, and their values from bf16 inputs and from the same ones in fp32."""
    from benchmarks.common.context_ranks import Case
    from megatron_m1.parallel.lasp import lasp_attention

    case = Case([0, 64], dtype=torch.bfloat16)
    layout = case.layout(rank, world_size)
    q, k, v, _ = (layout.take_local(x) for x in case.inputs())
    group = torch.distributed.group.WORLD
    _, low = lasp_attention(q, k, v, case.slopes(), layout, group)
    _, high = lasp_attention(q.float(), k.float(), v.float(), case.slopes(), layout, group)
    assert low is not None and high is not None
    return low.dtype, low, high


def test_states_are_fp32_in_a_bf16_model(workers: WorkerPool) -> None:
    for dtype, low, high in workers.run(bf16_states, world_size=2):
        assert dtype == torch.float32
        # The same bf16 numbers, multiplied and added in fp32 both times.
        assert torch.equal(low, high)


@pytest.mark.parametrize(
    ("length", "end", "message"),
    [(51, 51, "51 tokens, more than data.seq_length = 50"), (40, 39, "ends at 39, but the pack has 40 tokens")],
)
def test_a_pack_that_does_not_fit_is_one_line(length: int, end: int, message: str, workers: WorkerPool) -> None:
    sample = PackedSample(
        torch.zeros(length, dtype=torch.int64),
        torch.zeros(length, dtype=torch.int64),
        torch.ones(length),
        torch.tensor([0, end], dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=message) as caught:
        workers.run(losses, run_config({CP: 2}), [sample], world_size=2)
    assert "\n" not in str(caught.value)
