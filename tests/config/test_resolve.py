"""What ``resolve`` derives and refuses, and how layers are placed on stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_m1.config import Config
from megatron_m1.config.io import load_config, parse_config
from megatron_m1.config.pipeline import plan_stages
from megatron_m1.config.resolve import data_parallel_size, resolve
from megatron_m1.config.written import config_text, write_config

SHORT = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "layout": "parallel.pipeline_model_parallel_layout",
}


def read(settings: str) -> Config:
    """Make a configuration from ``tp=2 train.max_steps=5``; mesh sizes have short names."""
    pairs = [setting.split("=", 1) for setting in settings.split()]
    return parse_config([], [f"--{SHORT.get(name, name)}={value}" for name, value in pairs])


def test_derived_fields_on_a_cpu() -> None:
    config = resolve(read("tp=2 train.max_steps=5 train.global_batch_size=4 run.folder=runs/x/"), 4, has_gpu=False)
    assert config.model.residual_alpha == pytest.approx(2.0)  # (2 x 8 layers)^(1/4)
    assert config.model.transformer_impl == "local"
    assert config.parallel.sequence_parallel is True
    assert config.parallel.expert_tensor_parallel_size == 1
    assert config.parallel.virtual_pipeline_model_parallel_size is None
    assert (config.parallel.distributed_backend, config.train.precision) == ("gloo", "fp32")
    assert config.data.cache_folder == "runs/x/data_cache"
    assert data_parallel_size(config.parallel, 4) == 2


def test_the_file_of_a_run_has_the_fields_of_the_tree_and_nothing_left_to_derive(tmp_path: Path) -> None:
    given = read("tp=2 model.num_layers=16")
    resolved = resolve(given, 2, has_gpu=False)
    plain, derived = (yaml.safe_load(config_text(config)) for config in (given, resolved))
    assert {group: list(values) for group, values in derived.items() if group != "preset"} == {
        group: list(values) for group, values in plain.items() if group != "preset"
    }
    changed = {
        f"{group}.{name}": value
        for group, values in derived.items()
        if group != "preset"
        for name, value in values.items()
        if value != plain[group][name]
    }
    assert changed == {
        "model.residual_alpha": pytest.approx(32**0.25),
        "model.transformer_impl": "local",
        "parallel.expert_tensor_parallel_size": 1,
        "parallel.sequence_parallel": True,
        "parallel.distributed_backend": "gloo",
        "data.cache_folder": "runs/m1/data_cache",
        "train.max_steps": 1000,
        "train.precision": "fp32",
    }
    write_config(resolved, tmp_path / "config.yaml")
    assert resolve(load_config(tmp_path / "config.yaml"), 2, has_gpu=False) == resolved


def test_derived_fields_on_a_gpu() -> None:
    config = resolve(read("model.transformer_impl=local"), 8, has_gpu=True)
    assert (config.parallel.distributed_backend, config.train.precision) == ("nccl", "bf16")
    assert config.parallel.sequence_parallel is False


def test_resolving_again_changes_nothing_and_leaves_its_input_alone() -> None:
    given = read("tp=2 pp=2 vpp=2")
    once = resolve(given, 4, has_gpu=False)
    assert given == read("tp=2 pp=2 vpp=2")
    assert resolve(once, 4, has_gpu=False) == once


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ("tp=2", 2),
        ("tp=4", 4),  # 2 key/value heads over 4 ranks: megatron-core shares them
        ("pp=2 vpp=4", 2),
        ("pp=8", 8),
        ("ep=2 etp=2", 4),
        ("tp=2 ep=8", 8),
        ("tp=2 pp=2 ep=2", 8),
        ("pp=2 layout=Et*3|t*5L", 2),
        ("pp=2 layout=E(tt|)*3ttL", 2),
        ("train.recompute_granularity=selective train.recompute_modules=[core_attn,moe]", 1),
        ("train.recompute_granularity=full train.recompute_num_layers=8", 1),
        ("parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true", 1),
        ("cp=3 data.seq_length=513", 3),
        ("tp=2 cp=3 pp=2 ep=2 data.seq_length=514", 12),
        ("tp=2 data.seq_length=513", 2),
    ],
)
def test_meshes_that_fit(settings: str, world_size: int) -> None:
    parallel = resolve(read(settings), world_size, has_gpu=False).parallel
    model_ranks = (
        parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
    )
    assert model_ranks * data_parallel_size(parallel, world_size) == world_size


@pytest.mark.parametrize(
    ("settings", "world_size", "parts"),
    [
        ("tp=2", 3, ["tensor 2 x context 1 x pipeline 1 = 2", "3 processes"]),
        ("tp=2 pp=2", 6, ["= 4 ranks", "6 processes"]),
        ("tp=0", 1, ["tensor_model_parallel_size = 0"]),
        ("cp=2", 3, ["tensor 1 x context 2 x pipeline 1 = 2", "3 processes"]),
        ("cp=5 data.seq_length=9", 5, ["context_parallel_size = 5", "10 tokens", "seq_length = 9", "at most 4"]),
        ("ep=2", 1, ["expert 2 x expert tensor 1 = 2", "world 1 / pipeline 1"]),
        ("pp=2 ep=2 etp=2", 4, ["= 4 ranks", "world 4 / pipeline 2", "multiple of 8 processes"]),
        ("tp=3", 3, ["num_attention_heads = 4", "tensor_model_parallel_size = 3"]),
        ("tp=2 model.num_query_groups=3 model.num_attention_heads=6", 2, ["num_query_groups = 3"]),
        ("model.num_query_groups=3", 1, ["num_attention_heads = 4", "num_query_groups = 3"]),
        ("tp=2 model.vocab_size=4097", 2, ["vocab_size = 4097"]),
        ("ep=3", 3, ["num_moe_experts = 8", "expert_model_parallel_size = 3"]),
        ("etp=5", 5, ["moe_ffn_hidden_size = 192", "expert_tensor_parallel_size = 5"]),
        ("tp=2 parallel.sequence_parallel=false", 2, ["sequence_parallel = false"]),
        ("model.num_layers=12", 1, ["num_layers = 12", "8 kinds that model.mixers lists", ": 16 would be"]),
        ("model.mixers=[softmax,lightnin]", 1, ["model.mixers has 'lightnin'", "choose from lightning, softmax"]),
        ("model.mixers=[]", 1, ["model.mixers is empty"]),
        ("model.ffns=[moe,moe,moe]", 1, ["num_layers = 8", "3 kinds that model.ffns lists", ": 9 would be"]),
        ("model.ffns=[lightning]", 1, ["model.ffns has 'lightning'", "choose from moe"]),
        ("model.attention_period=3", 1, ["num_layers = 8", "3 kinds that model.mixers lists"]),
        ("model.moe_router_topk=9", 1, ["moe_router_topk = 9"]),
        ("parallel.moe_token_groups=0", 1, ["moe_token_groups = 0"]),
        (
            "parallel.moe_token_groups=9 data.seq_length=8",
            1,
            ["moe_token_groups = 9", "8 tokens", "data.seq_length = 8"],
        ),
        (
            "tp=2 cp=2 parallel.moe_token_groups=4 data.seq_length=11",
            4,
            ["moe_token_groups = 4", "3 tokens", "ranks 4"],
        ),
        ("model.moe_expert_capacity_factor=0.001 data.seq_length=512", 2, ["= 0.001", "1,024 tokens", "256 are"]),
        ("model.moe_router_topk=1", 1, ["moe_router_topk = 1", "at least 2"]),
        ("model.rotary_percent=0.3", 1, ["rotary_percent = 0.3"]),
        ("model.hidden_size=-1", 1, ["hidden_size = -1"]),
        ("pp=3", 3, ["num_layers = 8", "3 stages"]),
        ("vpp=2", 1, ["virtual_pipeline_model_parallel_size = 2"]),
        ("pp=2 vpp=3", 2, ["pipeline 2 x virtual 3 = 6 stages"]),
        ("pp=2 layout=Et*3|t*4L", 2, ["7 layers", "num_layers = 8"]),
        ("pp=2 layout=t*3|Et*5L", 2, ["must begin with its only E"]),
        ("pp=2 layout=Et*3|x|t*5L", 2, ["'x'"]),
        ("pp=2 layout=Et*3|t*2|t*3L", 2, ["3 stages", "pipeline_model_parallel_size = 2"]),
        ("pp=2 vpp=2 layout=Et*3|t*5L", 2, ["2 stages", "virtual 2 = 4"]),
        ("layout=Et*3|t*5L", 1, ["pipeline_model_parallel_size = 1"]),
        ("run.max_failed_saves=0", 1, ["run.max_failed_saves = 0"]),
        ("train.global_batch_size=9", 2, ["global_batch_size = 9", "data-parallel size 2"]),
        ("pp=2 vpp=2 train.global_batch_size=3", 2, ["3 micro-batches", "multiple of 2"]),
        ("data.validation=[x] train.eval_samples=3", 2, ["train.eval_samples = 3", "data-parallel size 2"]),
        (
            "data.validation=[x] pp=2 vpp=2 train.eval_samples=3",
            2,
            ["train.eval_samples = 3", "3 micro-batches", "multiple of 2"],
        ),
        ("train.recompute_modules=[layernorm]", 1, ["layernorm", "core_attn or moe"]),
        ("train.recompute_modules=[mlp]", 1, ["'mlp'"]),
        ("train.recompute_granularity=selective train.recompute_modules=[]", 1, ["recompute_modules is empty"]),
        (
            "train.recompute_granularity=full train.recompute_num_layers=9",
            1,
            ["recompute_num_layers = 9", "more than the 8 layers of"],
        ),
        ("parallel.overlap_param_gather=true", 1, ["overlap_grad_reduce"]),
        ("model.fp8=hybrid", 1, ["fp8 = hybrid", "transformer_engine"]),
        ("model.transformer_impl=transformer_engine", 1, ["transformer_engine needs GPUs"]),
        ("parallel.distributed_backend=nccl", 1, ["nccl needs GPUs"]),
        ("pp=2 parallel.pipeline_model_parallel_layout=Et*8L", 2, ["has 1 stage, not a multiple"]),
        ("optimizer.lr=0", 1, ["optimizer.lr = 0"]),
        ("optimizer.lr=.nan", 1, ["optimizer.lr = nan"]),
        ("optimizer.min_lr=1", 1, ["min_lr = 1.0 is above"]),
        ("optimizer.adam_beta2=1", 1, ["adam_beta2 = 1.0"]),
        ("train.max_steps=0", 1, ["max_steps = 0"]),
        ("data.seq_length=1", 1, ["data.seq_length = 1", "at least 2"]),
        ("train.profile_step_start=3", 1, ["profile_step_start = 3"]),
        (
            "train.loss_normalization=sample data.reset_at_documents=false",
            1,
            ["loss_normalization = sample", "reset_at_documents = false", "a pack as one sample"],
        ),
        ("run.folder=", 1, ["run.folder is empty"]),
        ("data.cache_folder=", 1, ["data.cache_folder is empty"]),
    ],
)
def test_what_cannot_run_is_one_line(settings: str, world_size: int, parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        resolve(read(settings), world_size, has_gpu=False)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ("ep=2", "expert_model_parallel_size"),
        ("etp=2", "expert_tensor_parallel_size"),
        ("ep=2 etp=2", "expert_model_parallel_size or parallel.expert_tensor_parallel_size"),
    ],
)
def test_the_size_to_lower_is_one_that_is_above_one(settings: str, fix: str) -> None:
    with pytest.raises(ValueError, match=rf": start a multiple of \d processes or lower parallel\.{fix}$"):
        resolve(read(settings), 1, has_gpu=False)


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ("tp=2 cp=2 parallel.moe_token_groups=4 data.seq_length=13", 4),
        ("model.moe_expert_capacity_factor=0.004 data.seq_length=512", 2),
        ("model.moe_router_load_balancing_type=none model.moe_aux_loss_coeff=0.5", 1),
    ],
)
def test_experts_that_are_just_possible(settings: str, world_size: int) -> None:
    resolve(read(settings), world_size, has_gpu=False)


@pytest.mark.parametrize(
    ("settings", "part"),
    [("train.precision=fp32", "train.precision = fp32"), ("model.kv_channels=28", "model.kv_channels = 28")],
)
def test_what_a_gpu_cannot_run_is_one_line(settings: str, part: str) -> None:
    with pytest.raises(ValueError, match=rf"^{part} on GPUs: [^\n]+$"):
        resolve(read(f"model.transformer_impl=local {settings}"), 1, has_gpu=True)


def test_kernels_for_gpus_are_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read("model.lightning_backend=triton")
    assert resolve(config, 1, has_gpu=True).model.lightning_backend == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")  # with which tests run them after all
    with pytest.raises(ValueError, match=r"^model\.lightning_backend = triton needs GPUs.*use auto or chunk$"):
        resolve(config, 1, has_gpu=False)


def test_a_layout_with_more_stages_than_ranks_is_interleaved() -> None:
    config = resolve(read("pp=2 layout=Et|ttt|tt|ttL"), 2, has_gpu=False)
    assert config.parallel.virtual_pipeline_model_parallel_size == 2
    placed = plan_stages(config.model, config.parallel).by_rank
    assert [[list(chunk.layers) for chunk in chunks] for chunks in placed] == [[[0], [4, 5]], [[1, 2, 3], [6, 7]]]
    assert [[chunk.has_embedding for chunk in chunks] for chunks in placed] == [[True, False], [False, False]]
    assert [[chunk.has_head for chunk in chunks] for chunks in placed] == [[False, False], [False, True]]


@pytest.mark.parametrize("layout", ["Et*3|t*5L", "E,tt|(tt|)*2,t,tL", "Etttt|ttttL", "E|t*8|L"])
def test_layouts_mean_what_megatron_core_takes_them_for(layout: str) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    pipeline = layout.count("|") + 1 if "*2" not in layout else 2
    config = read(f"pp={pipeline} layout={layout}")
    theirs = PipelineParallelLayerLayout(layout, pipeline).layout
    ours = plan_stages(config.model, config.parallel).by_rank
    assert [[len(chunk.layers) for chunk in chunks] for chunks in ours] == [
        [chunk.count(LayerType.decoder) for chunk in chunks] for chunks in theirs
    ]
