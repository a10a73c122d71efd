"""A kind of mixer that nobody else knows, in this file alone: counted, trained on meshes, saved, loaded, generating.

It is a gated average: every token gives values and gates, each channel of a token is the mean of its document's values
so far under the token's gate, and a matrix brings it back to the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_m1.cli import run
from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.resolve import resolve
from megatron_m1.config.resolved import ResolvedParallelConfig
from megatron_m1.layers import registry as layers
from megatron_m1.layers.caches import Caches
from megatron_m1.layers.engine import EngineConfig
from megatron_m1.layers.kind import LayerKind, Matrix
from megatron_m1.layers.pack import batch_params, layout_of
from megatron_m1.plan.flops import FLOPS_PER_BYTE, layout_cost, training_flops
from megatron_m1.plan.parameters import model_counts, rank_counts
from megatron_m1.runtime.pool import WorkerPool
from megatron_m1.shapes import registry as shapes
from megatron_m1.shapes.kind import MixerShape, Parameter, Share
from megatron_m1.shapes.residual import inner_gain, output_gain
from megatron_m1.training.step import GRAD_NORM
from tests.checkpoint import checkpoint_runs
from tests.convert import runs
from tests.model.meshes import assemble, gradients_and_trace, run_config

KIND = "gated_average"
STEPS = 4
GRADIENT_TOLERANCE = 2e-6
TRACE_TOLERANCE = 2e-4
"""As of the mesh tests, whose layers are as deep and whose sums are as long."""
CHECKPOINT_TOLERANCE = 1e-6
"""As of the checkpoint tests."""
LOGIT_TOLERANCE = 2e-5
"""As of the tests of generation."""

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


class AverageShape(MixerShape):
    def parameters(self, model: ModelConfig) -> list[Parameter]:
        hidden, width = model.hidden_size, model.num_attention_heads * model.kv_channels
        return [
            Parameter("linear_in.weight", (2 * width, hidden), "gated average", "tensor"),
            Parameter("linear_out.weight", (hidden, width), "gated average", "tensor"),
        ]

    def flops_per_token(self, model: ModelConfig) -> int:
        return 6 * model.hidden_size * model.num_attention_heads * model.kv_channels

    def saved_bytes(self, model: ModelConfig, share: Share) -> int:
        # The input; opened gates, means and their product; and what the sums are divided by.
        width = model.num_attention_heads * model.kv_channels // share.tensor
        return share.outside * model.hidden_size * share.itemsize + share.tokens * (3 * width * share.itemsize + 4)

    def state_bytes(self, model: ModelConfig) -> int:
        return 4 * model.num_attention_heads * model.kv_channels

    def check_split(self, model: ModelConfig, parallel: ResolvedParallelConfig) -> None:
        if parallel.context_parallel_size > 1:
            raise ValueError(f"parallel.context_parallel_size = {parallel.context_parallel_size}: {KIND} takes only 1")


class AverageCache:
    """The sum of each sequence's values."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self.sums = torch.zeros(0)

    def average(self, values: Tensor, bounds: Sequence[int], caches: Caches) -> Tensor:
        if not self.sums.numel():
            self.sums = torch.zeros(self._sequences, values.shape[1])
        means = []
        for sequence, (start, stop) in zip(caches.active, pairwise(bounds), strict=True):
            sums = self.sums[sequence] + values[start:stop].cumsum(0)
            self.sums[sequence] = sums[-1]
            means.append(sums / (caches.lengths[sequence] + torch.arange(1, stop - start + 1))[:, None])
        return torch.cat(means)

    def nbytes(self) -> int:
        return self.sums.nbytes


@dataclass
class AverageSubmodules:
    linear_in: type
    linear_out: type


class Average(MegatronModule):
    def __init__(
        self,
        config: EngineConfig,
        submodules: AverageSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **interface: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        width = config.model.num_attention_heads * config.model.kv_channels
        common: dict[str, Any] = dict(config=config, bias=False, is_expert=False, tp_group=self.tp_group)
        common |= dict(init_method=config.init_method)
        self.linear_in = submodules.linear_in(
            config.hidden_size, 2 * width, gather_output=False, skip_bias_add=False, **common
        )
        self.linear_out = submodules.linear_out(
            width, config.hidden_size, input_is_parallel=True, skip_bias_add=True, **common
        )

    def forward(self, hidden_states: Tensor, *, packed_seq_params: Any, **interface: Any) -> tuple[Tensor, None]:
        params = batch_params(packed_seq_params, 1)
        bounds, caches = layout_of(params).local_document_bounds, params.caches
        mixed, _ = self.linear_in(hidden_states)
        # [n, 1, width * 2] -> [n, width, 2]: the value and the gate of each channel
        values, gates = mixed.view(mixed.shape[0], -1, 2).unbind(2)
        if caches is not None:
            means = caches.of_layer(self.layer_number, AverageCache).average(values, bounds, caches)
        else:
            documents = [values[start:stop] for start, stop in pairwise(bounds)]
            means = torch.cat([part.cumsum(0) / torch.arange(1, len(part) + 1)[:, None] for part in documents])
        output, _ = self.linear_out((gates.sigmoid() * means).unsqueeze(1))
        return output, None


class AverageKind(LayerKind):
    def spec(self, config: EngineConfig, provider: BackendSpecProvider) -> ModuleSpec:
        return ModuleSpec(
            module=Average,
            submodules=AverageSubmodules(provider.column_parallel_linear(), provider.row_parallel_linear()),
        )

    def matrices(
        self, module: Average, prefix: str, config: EngineConfig, groups: ProcessGroupCollection
    ) -> Iterator[tuple[Tensor, Matrix]]:
        model = config.model
        hidden, width = model.hidden_size, model.num_attention_heads * model.kv_channels
        inner, out = module.linear_in.weight.data, module.linear_out.weight.data
        first = groups.tp.rank() * out.shape[1]
        # [width * 2, hidden] -> [width, 2, hidden]
        parts = inner.view(-1, 2, hidden)
        name = f"{prefix}.{KIND}"
        yield parts[:, 0], Matrix(f"{name}.value", width, hidden, first_row=first, gain=inner_gain(model))
        yield parts[:, 1], Matrix(f"{name}.gate", width, hidden, first_row=first)
        yield out, Matrix(f"{name}.out", hidden, width, first_column=first, gain=output_gain(model))


shapes.register_mixer(KIND, AverageShape())
layers.register_mixer(KIND, AverageKind())


def own_config(parallel: dict[str, Any] | None = None) -> Config:
    """Four layers, two lightning and two of our own: hidden 40, 4 heads of 16, 4 experts of 36, 104 tokens."""
    return run_config(parallel or {}, num_layers=4, mixers=["lightning", KIND])


def here[**P, T](rank: int, world_size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of another module on a worker, which has imported this one for ``here``, and knows the kind."""
    return function(rank, world_size, *arguments)


def test_its_parameters_and_flops() -> None:
    model = own_config().model
    average, lightning, experts = 3 * 40 * 64, 5 * 40 * 64 + 64, 4 * 3 * 40 * 36
    counts = model_counts(model)
    assert counts.groups == {
        "embedding": 104 * 40,
        "lightning attention": 2 * lightning,
        "gated average": 2 * average,
        "router": 4 * 4 * 40,
        "experts": 4 * experts,
        "norms": 9 * 40,
        "head": 104 * 40,
    }
    mesh = own_config({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    first, second = rank_counts(model, resolve(mesh, 4, has_gpu=False).parallel)
    assert first["gated average"] == second["gated average"] == average // 2
    per_token = 2 * (6 * 40 * 64) + 2 * (10 * 40 * 64 + 4 * 64 * 16) + 4 * (2 * 6 * 40 * 36 + 2 * 40 * 4) + 2 * 40 * 104
    assert training_flops(model, [3, 2]) == 3 * 5 * per_token
    cost = layout_cost(model)
    assert (cost.per_token, cost.per_pair) == (3 * per_token, 0)
    assert cost.per_state == FLOPS_PER_BYTE * 2 * (2 * 4 * 4 * 16**2 + 2 * 4 * 64)  # fp32, there and back


def test_it_is_in_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--preset", "tiny", f"--model.mixers=[lightning, {KIND}]"]) == 0
    out = capsys.readouterr().out.splitlines()
    (row,) = [line for line in out if line.startswith("gated average")]
    assert row.split() == ["gated", "average", *[f"{4 * 3 * 128 * 128:,}"] * 2]
    assert [line.split()[1] for line in out[-8:]] == ["lightning", KIND] * 4


def test_what_it_refuses_and_what_is_taken() -> None:
    with pytest.raises(ValueError, match=r"^parallel\.context_parallel_size = 2: gated_average takes only 1$"):
        resolve(own_config({"context_parallel_size": 2}), 2, has_gpu=False)
    with pytest.raises(ValueError, match=r"^layer kind 'lightning' exists already, as Lightning: give another name$"):
        shapes.register_mixer("lightning", AverageShape())
    with pytest.raises(ValueError, match=r"^layer kind 'gated_average' exists already"):
        layers.register_mixer(KIND, AverageKind())
    with pytest.raises(ValueError, match=r"^layer kind 'moe' exists already"):
        layers.register_ffn("moe", AverageKind())


@pytest.fixture(scope="module")
def one_process(workers: WorkerPool) -> dict[str, Any]:
    (result,) = workers.run(here, gradients_and_trace, own_config(), STEPS, world_size=1)
    return result


@pytest.mark.parametrize("parallel", [TP2, PP2], ids=["tp2", "pp2"])
def test_a_mesh_trains_it_as_one_process_does(
    parallel: dict[str, int], workers: WorkerPool, one_process: dict[str, Any]
) -> None:
    results = workers.run(here, gradients_and_trace, own_config(parallel), STEPS, world_size=2)
    expected = assemble([one_process["parts"]])
    gradients = assemble([result["parts"] for result in results])
    assert gradients.keys() == expected.keys()
    assert sum(value.numel() for value in expected.values()) == model_counts(own_config().model).total
    errors = {key: ((gradients[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] < GRADIENT_TOLERANCE, f"{worst}: {errors[worst]}"
    assert len([key for key in expected if "linear_in" in key or "linear_out" in key]) == 4
    for result in results:
        pairs = [(result["first"], one_process["first"], GRADIENT_TOLERANCE)]
        pairs += [(a, b, TRACE_TOLERANCE) for a, b in zip(result["trace"], one_process["trace"], strict=True)]
        for step, truth, tolerance in pairs:
            assert step.updated
            assert step.loss == pytest.approx(truth.loss, rel=tolerance)
            assert step.figures[GRAD_NORM] == pytest.approx(truth.figures[GRAD_NORM], rel=tolerance)


def test_a_checkpoint_of_one_mesh_goes_on_on_another(workers: WorkerPool, tmp_path: Path) -> None:
    save, resume = checkpoint_runs.save_while_training, checkpoint_runs.resume
    saved = workers.run(here, save, own_config(TP2), tmp_path, 3, [1], world_size=2)
    for resumed in workers.run(here, resume, own_config(PP2), tmp_path, 3, world_size=2):
        assert resumed.state == checkpoint_runs.state_at(1)
        for step, truth in zip(resumed.figures, saved[0].figures[1:], strict=True):
            assert step == pytest.approx(truth, rel=CHECKPOINT_TOLERANCE)


def train_and_generate(rank: int, world_size: int, folder: Path, prompts: list[list[int]]) -> runs.Generated:
    """A run folder, and from it the sampler against the forward pass of training."""
    runs.train_and_save(rank, world_size, own_config(), folder)
    return runs.generate_and_compare(rank, world_size, folder, prompts, 5, [64, 1, 5])


def test_it_generates_what_training_computes(workers: WorkerPool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 104, (length,), generator=generator).tolist() for length in (1, 17, 6)]
    (result,) = workers.run(train_and_generate, tmp_path / "run", prompts, world_size=1)
    assert max(result.errors.values()) < LOGIT_TOLERANCE
    assert result.tokens == result.greedy
    assert {sizes[2] for sizes in result.bytes_by_step} == {3 * AverageShape().state_bytes(own_config().model)}
    with pytest.raises(
        ValueError, match=r"^model\.mixers has 'gated_average', for which MiniMax-M1's format has no words"
    ):
        run(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf")])
    assert not (tmp_path / "hf").exists()
