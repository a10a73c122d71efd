"""The map over the real index of MiniMax-M1, and its moves against their inverse."""

from __future__ import annotations

import copy
import json
import lzma
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_m1.cli import run
from megatron_m1.config.presets import m1_456b, tiny
from megatron_m1.convert.families.minimax_m1.config import VLLM, caveats, hub_config, model_from_hf, native_config
from megatron_m1.convert.families.minimax_m1.weights import check_names, check_spelled, to_hub, to_ours, units
from megatron_m1.convert.hub_folder import expected_bytes
from megatron_m1.plan.parameters import model_counts
from megatron_m1.shapes.registry import FFNS, MIXERS, layer_mixers
from megatron_m1.shapes.softmax import rotary_dim
from tests.convert.runs import config_of

HUB = Path(__file__).parent / "minimax_m1"
"""config.json and the weights' index of the hub's MiniMax-M1, the second compressed."""
HUB_BYTES = 912_210_767_872


def hub_index() -> dict[str, Any]:
    index: dict[str, Any] = json.loads(lzma.decompress((HUB / "model.safetensors.index.json.xz").read_bytes()))
    return index


def hub_folder(folder: Path, index: dict[str, Any]) -> Path:
    shutil.copy(HUB / "config.json", folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_every_name_and_byte_of_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = hub_index()
    assert len(index["weight_map"]) == 8243 and index["metadata"]["total_size"] == HUB_BYTES
    assert run(["convert", "from-hf", str(hub_folder(tmp_path, index)), str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "would write 8,243 tensors, 912,210,767,872 bytes of weights, bfloat16"
    assert len(said) == 2 and said[1].startswith("note: router_aux_loss_coef = 0.001 is not taken over: ")
    assert not (tmp_path / "out").exists()


def test_every_shape_of_the_hub() -> None:
    """Shapes as the released modeling file has them; ours have all of the model's parameters."""
    config = json.loads((HUB / "config.json").read_text())
    model = model_from_hf(config)
    assert model.mixers == ["lightning"] * 7 + ["softmax"] and model.rotary_percent == 0.5 and model.rotary_base == 1e7
    wanted = units(model)
    shapes = {part.name: part.shape for unit in wanted for part in unit.parts}
    assert len(shapes) == 8243
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (24576, 6144)
    assert shapes["model.layers.0.self_attn.output_gate.weight"] == (8192, 6144)
    assert shapes["model.layers.78.self_attn.out_proj.weight"] == (6144, 8192)
    assert shapes["model.layers.78.self_attn.norm.weight"] == (8192,)
    assert shapes["model.layers.7.self_attn.q_proj.weight"] == (8192, 6144)
    assert shapes["model.layers.79.self_attn.k_proj.weight"] == (1024, 6144)
    assert shapes["model.layers.79.self_attn.v_proj.weight"] == (1024, 6144)
    assert shapes["model.layers.79.self_attn.o_proj.weight"] == (6144, 8192)
    assert shapes["model.layers.3.block_sparse_moe.gate.weight"] == (32, 6144)
    assert shapes["model.layers.3.block_sparse_moe.experts.31.w1.weight"] == (9216, 6144)
    assert shapes["model.layers.3.block_sparse_moe.experts.31.w2.weight"] == (6144, 9216)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (200064, 6144)
    assert sum(unit.numel for unit in wanted) == model_counts(m1_456b()).total == 456_089_655_296
    assert expected_bytes(wanted, torch.bfloat16) == HUB_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.7.self_attn.q_proj.weight": None}, r"lacks 1 tensor: model\.layers\.7\.self_attn\.q_proj"),
        (
            {"model.layers.0.self_attn.q_proj.weight": "x"},
            r"has, and the map does not know, 1 tensor: .*0\.self_attn\.q",
        ),
        (
            {"lm_head.weight": None, "model.layers.0.shared_mlp.weight": "x"},
            r"lacks 1 tensor: lm_head\.weight; it has, .*: model\.layers\.0\.shared_mlp",
        ),
    ],
)
def test_an_index_that_the_map_does_not_cover(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    index = hub_index()
    for name, file in change.items():
        index["weight_map"].pop(name, None)
        if file:
            index["weight_map"][name] = file
    with pytest.raises(ValueError, match=message):
        run(["convert", "from-hf", str(hub_folder(tmp_path, index)), str(tmp_path / "out"), "--dry-run"])


def test_another_total_size(tmp_path: Path) -> None:
    index = hub_index()
    index["metadata"]["total_size"] -= 31_457_280  # what a bf16 router would save
    message = (
        r"total_size is 912179310592, but the map's tensors have 912,210,767,872 in bfloat16 or 1,824,3.* in float32"
    )
    with pytest.raises(ValueError, match=message):
        run(["convert", "from-hf", str(hub_folder(tmp_path, index)), str(tmp_path / "out"), "--dry-run"])


def test_a_total_size_that_is_no_number(tmp_path: Path) -> None:
    index = hub_index()
    index["metadata"]["total_size"] = [HUB_BYTES]
    with pytest.raises(ValueError, match=r"total_size is \[912210767872\], but the map's tensors have"):
        run(["convert", "from-hf", str(hub_folder(tmp_path, index)), str(tmp_path / "out"), "--dry-run"])


def test_moves_and_their_inverse() -> None:
    for unit in units(config_of({}).model):
        hub = [torch.randn(part.shape) for part in unit.parts]
        ours = to_ours(unit, hub)
        assert tuple(ours.shape) == unit.sizes
        for again, piece in zip(to_hub(unit, ours), hub, strict=True):
            assert torch.equal(again, piece)


def test_rows_lie_as_the_table_says() -> None:
    model = config_of({}).model  # 4 heads of 16, 2 key/value heads, ffn 36
    by_name = {unit.ours: unit for unit in units(model)}

    def labelled(name: str) -> list[str]:
        """Our rows, each as the part it comes from and its row there."""
        unit = by_name[name]
        parts = [torch.arange(part.shape[0]) + 1000 * i for i, part in enumerate(unit.parts)]
        rows = to_ours(unit, [part[:, None].expand(-1, 40).contiguous() for part in parts])
        return [f"{'abc'[row // 1000]}{row % 1000}" for row in rows.reshape(-1, 40)[:, 0].tolist()]

    lightning = labelled("decoder.layers.0.self_attention.linear_qkvg.weight")
    assert [lightning[i] for i in (0, 47, 48, 63, 64, 112, 255)] == ["a0", "a47", "b0", "b15", "a48", "b16", "b63"]
    softmax = labelled("decoder.layers.7.self_attention.linear_qkv.weight")
    assert [softmax[i] for i in (0, 31, 32, 47, 48, 63, 64, 96)] == [
        "a0",
        "a31",
        "b0",
        "b15",
        "c0",
        "c15",
        "a32",
        "b16",
    ]
    experts = labelled("decoder.layers.0.mlp.experts.experts.linear_fc1.weight")
    assert [experts[i] for i in (0, 35, 36, 71)] == ["a0", "a35", "b0", "b35"]


def test_names_of_both_sides_are_errors() -> None:
    with pytest.raises(ValueError, match=r"^here lacks 1 tensor: b; it has, and the map does not know, 1 tensor: c$"):
        check_names(["a", "b"], ["a", "c"], "here")
    check_names(["a"], ["a"], "here")


HUB_ONLY = json.loads((HUB / "config.json").read_text())


def changed(**keys: Any) -> dict[str, Any]:
    config = copy.deepcopy(HUB_ONLY)
    for name, value in keys.items():
        if value is ...:
            del config[name]
        else:
            config[name] = value
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(model_type="llama"), r"^model_type = 'llama': only minimax"),
        (changed(postnorm=False), r"^postnorm = False has no counterpart here: it must be True"),
        (changed(postnorm=...), r"^postnorm is missing"),
        (changed(hidden_act="gelu"), r"^hidden_act = 'gelu' has no counterpart"),
        (changed(tie_word_embeddings=True), r"^tie_word_embeddings = True"),
        (changed(shared_intermediate_size=512), r"^shared_intermediate_size = 512"),
        (changed(quantization_config={"bits": 8}), r"^quantization_config = "),
        (changed(num_hidden_layers="80"), r"^num_hidden_layers = '80': it must be a whole number above 0$"),
        (changed(num_hidden_layers=...), r"^num_hidden_layers is missing$"),
        (changed(num_attention_heads=0), r"^num_attention_heads = 0: it must be a whole number above 0$"),
        (changed(vocab_size=10**400), r"^vocab_size = 1000.*: it must be a whole number above 0$"),
        (changed(num_key_value_heads=7), r"^model\.num_attention_heads = 64 is not divisible by"),
        (changed(num_experts_per_tok=33), r"^model\.moe_router_topk = 33 is more than model\.num_moe_experts = 32"),
        (changed(rms_norm_eps="1e-5"), r"^rms_norm_eps = '1e-5': it must be a number$"),
        (changed(rms_norm_eps=-1.0), r"^model\.layernorm_epsilon = -1\.0: it must be a finite number above 0$"),
        (changed(layernorm_mlp_alpha="3"), r"^layernorm_mlp_alpha = '3': it must be a number$"),
        (changed(max_position_embeddings=0), r"^max_position_embeddings = 0: it must be a whole number above 0$"),
        (changed(rotary_dim=63), r"rotates 63 dimensions: it must be an even number up to 128$"),
        (changed(rotary_dim="x"), r"^rotary_dim = 'x': it must be a whole number above 0$"),
        (changed(rope_parameters=[1]), r"^rope_parameters = \[1\]: it must be an object$"),
        (changed(attn_type_list=[2] * 80), r"^attn_type_list = .* it must be a list of 0 and 1, one for each layer$"),
        (changed(attn_type_list=1), r"^attn_type_list = 1: it must be a list of 0 and 1, one for each layer$"),
        (changed(layer_types=["foo"]), r"^layer_types = \['foo'\]: it must be a list of 'linear_attention' and"),
        (changed(attn_type_list=...), r"^neither attn_type_list nor layer_types"),
        (changed(attn_type_list=[0] * 79), r"^attn_type_list has 79 entries for 80 layers"),
        (changed(layer_types=["full_attention", "linear_attention"] * 40), r"contradict each other"),
        (changed(layernorm_mlp_alpha=1.0), r"^residual factors differ"),
        (changed(rope_theta=...), r"^rope_theta is missing"),
        (changed(rope_parameters={"rope_type": "yarn", "rope_theta": 1e7}), r"only the default kind"),
        (changed(rope_parameters={"type": "yarn", "rope_theta": 1e7}), r"^rope_parameters = .*only the default kind"),
        (changed(rope_parameters={"rope_type": [], "rope_theta": 1e7}), r"^rope_parameters = .*only the default kind"),
        (changed(partial_rotary_factor=1.0), r"^rotary_dim and partial_rotary_factor contradict"),
        (changed(layernorm_mlp_alpha=None), r"^residual factors differ.*'layernorm_mlp_alpha': 1\.0"),
        (changed(rope_theta=10**400), r"^rope_theta = 1000.*: it must be a number$"),
        (changed(rope_scaling={"type": "linear", "factor": 2}), r"^rope_scaling = .*: only the default kind"),
        (changed(rope_parameters={"partial_rotary_factor": 1.0, "rope_theta": 1e7}), r"^rotary_dim and partial_rot"),
        (changed(hidden_size=...), r"^hidden_size is missing"),
    ],
)
def test_configs_that_are_another_model(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_from_hf(config)


@pytest.mark.parametrize("kinds", [[0, 1] * 39 + [1, 0], [0] * 80, [1, 0, 0, 0] * 20])
def test_any_order_of_layers_is_read_and_written(kinds: list[int]) -> None:
    model = model_from_hf(changed(attn_type_list=kinds))
    assert layer_mixers(model) == [["lightning", "softmax"][kind] for kind in kinds]
    assert hub_config(model, torch.bfloat16, 77)["attn_type_list"] == kinds
    written = native_config(model, torch.bfloat16, 77)["layer_types"]
    assert written == [["linear_attention", "full_attention"][kind] for kind in kinds]


def test_the_map_and_the_shapes_have_the_same_parameters() -> None:
    """They are written apart: the map gives the hub's rows, the shapes what is counted."""
    model = config_of({}).model
    by_name = {unit.ours: unit.shape for unit in units(model)}
    for layer, mixer in enumerate(layer_mixers(model)):
        for place, shape in (("self_attention", MIXERS[mixer]), ("mlp", FFNS["moe"])):
            for parameter in shape.parameters(model):
                stack = (parameter.copies,) if parameter.split == "expert" else ()
                assert by_name[f"decoder.layers.{layer}.{place}.{parameter.name}"] == (*stack, *parameter.shape)


def test_a_residual_that_the_format_has_no_words_for() -> None:
    check_spelled(tiny())
    with pytest.raises(ValueError, match=r"^model\.residual = prenorm can't be converted"):
        check_spelled(replace(tiny(), residual="prenorm"))
    with pytest.raises(ValueError, match=r"^model\.moe_router_score_function = sigmoid can't be converted"):
        check_spelled(replace(tiny(), moe_router_score_function="sigmoid"))


def test_null_is_as_good_as_missing() -> None:
    nulls = changed(max_position_embeddings=None, hidden_act=None, tie_word_embeddings=None, lightning_norm_eps=None)
    parameters = {"rope_type": None, "rope_theta": 1e7, "partial_rotary_factor": None}
    config = nulls | {"rope_parameters": parameters, "rope_scaling": {"type": "default"}}
    assert model_from_hf(config) == replace(model_from_hf(HUB_ONLY), max_position_embeddings=None)


def test_every_even_share_of_a_head_is_rotated_as_said() -> None:
    for dim in range(2, 300, 2):
        for rotated in range(2, dim + 1, 2):
            model = model_from_hf(changed(head_dim=dim, rotary_dim=rotated))
            assert int(dim * model.rotary_percent) == rotary_dim(model) == rotated


def test_configs_go_there_and_back() -> None:
    model = tiny()
    model.residual_alpha, model.rotary_percent, model.rotary_base = 2.5, 0.25, 12_345.0
    model.max_position_embeddings, model.lightning_norm_epsilon = 77, 3e-6
    assert model_from_hf(hub_config(model, torch.float32, 77)) == model
    native = native_config(model, torch.float32, 77)
    assert model_from_hf(native) == model
    assert not {"postnorm", "attn_type_list", "rotary_dim"} & set(native)
    both = hub_config(model, torch.bfloat16, 77)
    assert both["model_type"] == "minimax" and both["dtype"] == "bfloat16" and "auto_map" not in both
    assert both["postnorm"] is True and both["rotary_dim"] == 8 and both["attn_type_list"] == [0] * 7 + [1]
    assert both["layernorm_mlp_alpha"] == both["mlp_alpha_factor"] == both["full_attn_alpha_factor"] == 2.5


def test_what_readers_get_wrong() -> None:
    """Of M1: transformers' rotary embedding and vLLM's epsilon; of a model that suits both, vLLM's last version."""
    model = model_from_hf(HUB_ONLY)
    rotary, epsilon, _ = caveats(model)
    assert rotary.startswith("native transformers rotates whole softmax heads (128 dimensions instead of the first 64)")
    assert epsilon.startswith("vLLM uses 1e-05 in the norm inside lightning layers, this model 1e-06: ")
    assert caveats(replace(model, rotary_percent=1.0)) == [epsilon, VLLM]
    assert caveats(replace(model, rotary_percent=1.0, layernorm_epsilon=1e-6)) == [VLLM]
    theirs, _ = caveats(replace(model, rotary_percent=1.0, lightning_norm_epsilon=1e-5))
    assert theirs.startswith("native transformers uses 1e-06 in the norm inside lightning layers, this model 1e-05: ")
    (unread,) = caveats(model, native=True)
    assert unread.startswith("vLLM can't read this format")
