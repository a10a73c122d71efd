"""``config.json`` of a Hugging Face folder: written with the keys of every reader, read from either spelling.

The hub's MiniMax-M1 and native transformers name the same things differently, and each silently ignores the other's
names: a reader that misses ``postnorm``, ``rotary_dim`` or the residual factors computes another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from megatron_m1.config import ModelConfig
from megatron_m1.config.resolve import check_model
from megatron_m1.convert.families.minimax_m1 import rotary
from megatron_m1.convert.places import check_model_type
from megatron_m1.shapes.registry import layer_mixers
from megatron_m1.shapes.residual import residual_alpha
from megatron_m1.shapes.softmax import rotary_dim

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Our names of the dtypes that weights may have."""
NATIVE_BLOCK = 256
"""Tokens of a block in native transformers' lightning attention; its saved buffers have this size."""
NATIVE_NORM_EPSILON = 1e-6
"""Epsilon inside lightning layers of native transformers and of the hub's own code."""
VLLM = (
    "vLLM reads such folders up to 0.23.0, which is the last version with this model (its PR #45993); outputs of its "
    "prefill kernel for lightning layers, measured as 0.32.0 has it under Triton's interpreter, are off by 0.2 to 2.4% "
    "on average beyond 256 tokens of prompt"
)
"""What users of vLLM should know."""
_NORM_EPSILON_KEY = "lightning_norm_eps"
"""Ours; no other reader knows it."""
_FACTORS = {"full": "full_attention", "linear": "linear_attention", "mlp": "mlp"}
"""Native name of a residual factor -> the hub's."""
_MIXERS: dict[str, dict[str, Any]] = {
    "attn_type_list": {"lightning": 0, "softmax": 1},
    "layer_types": {"lightning": "linear_attention", "softmax": "full_attention"},
}
"""Key -> how it spells each kind of ``model.mixers``."""
_MUST_BE: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "sliding_window": None,
    "shared_intermediate_size": 0,
    "router_jitter_noise": 0,
    "attention_dropout": 0,
    "quantization_config": None,
    "postnorm": True,
}
"""Keys whose other values this model has no counterpart for; where a key is missing, this value is meant."""


def native_config(model: ModelConfig, dtype: torch.dtype, max_positions: int) -> dict[str, Any]:
    """Return the keys that native transformers' ``MiniMaxConfig`` reads, for weights of ``units(native_heads=True)``.

    Partial rotary is spelled as the rope type of ``rotary``; ``has_native_heads`` tells such a file.
    Transformers before 5 ignores ``rope_parameters`` and would take its own base and whole heads: it reads
    ``rope_theta`` and ``rope_scaling``.

    Args:
        model: shape and numerics.
        dtype: of the weights.
        max_positions: tokens of the longest sequence that the model is meant for.
    """
    config = _common_config(model, dtype, max_positions)
    rotated, head_dim = rotary_dim(model), model.kv_channels
    if rotated < head_dim:
        config["rope_parameters"] = rotary.rope_parameters(
            base=model.rotary_base, rotated=rotated, head_dim=head_dim, max_positions=max_positions
        )
        config["rope_scaling"] = _as_scaling(config["rope_parameters"])
    return config


def _as_scaling(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` as transformers before 5 has them, with the base outside."""
    return {key: value for key, value in parameters.items() if key != "rope_theta"}


def has_native_heads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` that ``model_from_hf`` accepts goes with rows in native transformers' order."""
    return bool((config.get("rope_parameters") or {}).get("rope_type") == rotary.ROPE_TYPE)


def _common_config(model: ModelConfig, dtype: torch.dtype, max_positions: int) -> dict[str, Any]:
    """Keys of both formats."""
    alpha, beta = residual_alpha(model), model.residual_beta
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.moe_ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": False,
        "num_experts_per_tok": model.moe_router_topk,
        "num_local_experts": model.num_moe_experts,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rotary_base,
            "partial_rotary_factor": model.rotary_percent,
        },
        "rope_theta": model.rotary_base,
        "layer_types": _spelled_mixers(model, "layer_types"),
        "block_size": NATIVE_BLOCK,
        _NORM_EPSILON_KEY: model.lightning_norm_epsilon,
        **{f"{native}_{part}_factor": value for native, part, value in _native_factors(alpha, beta)},
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _spelled_mixers(model: ModelConfig, key: str) -> list[Any]:
    return [_MIXERS[key][name] for name in layer_mixers(model)]


def _native_factors(alpha: float, beta: float) -> list[tuple[str, str, float]]:
    prefixes = [name if name == "mlp" else f"{name}_attn" for name in _FACTORS]
    return [(prefix, part, value) for prefix in prefixes for part, value in (("alpha", alpha), ("beta", beta))]


def hub_config(model: ModelConfig, dtype: torch.dtype, max_positions: int) -> dict[str, Any]:
    """Return native transformers' keys and, besides, those of the hub's MiniMax-M1, which vLLM reads.

    ``model_type`` is native transformers' ``minimax``: it refuses ``minimax_m1``.
    """
    alpha, beta = residual_alpha(model), model.residual_beta
    config = _common_config(model, dtype, max_positions)
    config |= {
        "attn_type_list": _spelled_mixers(model, "attn_type_list"),
        **{f"layernorm_{hub}_alpha": alpha for hub in _FACTORS.values()},
        **{f"layernorm_{hub}_beta": beta for hub in _FACTORS.values()},
        "postnorm": True,
        "rotary_dim": rotary_dim(model),
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
    }
    return config


def caveats(model: ModelConfig, *, native: bool = False) -> list[str]:
    """What readers of an exported folder will get wrong, one line each, and why.

    Args:
        model: shape and numerics.
        native: of the format that native transformers saves; else of the hub's.
    """
    lines = []
    if model.rotary_percent != 1.0 and not native:
        lines.append(
            f"native transformers rotates whole softmax heads ({model.kv_channels} dimensions instead of the first "
            f"{rotary_dim(model)}): it ignores rotary_dim and partial_rotary_factor here, so its logits differ; "
            "--format native spells the rotation so that it is exact"
        )
    if model.lightning_norm_epsilon != NATIVE_NORM_EPSILON:
        lines.append(
            f"native transformers uses {NATIVE_NORM_EPSILON:g} in the norm inside lightning layers, this model "
            f"{model.lightning_norm_epsilon:g}: it reads no key that says so"
        )
    if native:
        return [*lines, "vLLM can't read this format: it fails on the decay tables that native transformers saves"]
    if model.lightning_norm_epsilon != model.layernorm_epsilon:
        lines.append(
            f"vLLM uses {model.layernorm_epsilon:g} in the norm inside lightning layers, this model "
            f"{model.lightning_norm_epsilon:g}: it takes rms_norm_eps or its own default there"
        )
    return [*lines, VLLM]


def model_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate the content of a ``config.json``, in the hub's spelling, in native transformers', or in both.

    Raises:
        ValueError: it is another kind of model, has a feature that ours lacks, or the two spellings contradict each
            other; one line.
    """
    check_model_type(config)
    # A key that is null is as good as missing.
    config = {key: value for key, value in config.items() if value is not None}
    for key, value in _MUST_BE.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} = {config[key]!r} has no counterpart here: it must be {value!r}")
    if "postnorm" not in config and "layer_types" not in config:
        raise ValueError("postnorm is missing, which the hub's code reads as false: this model needs postnorm = true")
    layers, heads, hidden = (_count(config, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    dim = _count(config, "head_dim") if "head_dim" in config else hidden // heads
    alpha, beta = _residual(config)
    theta, percent = _rotary(config, dim)
    longest = "max_position_embeddings"
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        kv_channels=dim,
        num_query_groups=_count(config, "num_key_value_heads"),
        mixers=_mixers(config, layers),
        moe_ffn_hidden_size=_count(config, "intermediate_size"),
        num_moe_experts=_count(config, "num_local_experts"),
        moe_router_topk=_count(config, "num_experts_per_tok"),
        vocab_size=_count(config, "vocab_size"),
        max_position_embeddings=_count(config, longest) if longest in config else None,
        rotary_base=theta,
        rotary_percent=percent,
        layernorm_epsilon=_number(config, "rms_norm_eps"),
        lightning_norm_epsilon=_number({_NORM_EPSILON_KEY: NATIVE_NORM_EPSILON} | config, _NORM_EPSILON_KEY),
        residual_alpha=alpha,
        residual_beta=beta,
    )
    check_model(model)
    return model


def unread(config: Mapping[str, Any]) -> list[str]:
    """What of a ``config.json`` is left out on purpose, one line each, and why."""
    coefficient = config.get("router_aux_loss_coef")
    if coefficient is None or coefficient == ModelConfig.moe_aux_loss_coeff:
        return []
    return [
        f"router_aux_loss_coef = {coefficient} is not taken over: in released folders it is a template's value, M1 was "
        f"trained with {ModelConfig.moe_aux_loss_coeff}; set model.moe_aux_loss_coeff to change that"
    ]


def _count(config: Mapping[str, Any], key: str) -> int:
    value = _there(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
        raise ValueError(f"{key} = {value!r}: it must be a whole number above 0")
    return value


def _number(config: Mapping[str, Any], key: str) -> float:
    value = _there(config, key)
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"{key} = {value!r}: it must be a number")


def _there(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ValueError(f"{key} is missing")
    return config[key]


def _mixers(config: Mapping[str, Any], layers: int) -> list[str]:
    lists: dict[str, list[str]] = {}
    for key, spelling in _MIXERS.items():
        kinds = config.get(key)
        if kinds is None:
            continue
        values = list(spelling.values())
        if not isinstance(kinds, list) or any(kind not in values for kind in kinds):
            words = " and ".join(map(repr, values))
            raise ValueError(f"{key} = {kinds!r}: it must be a list of {words}, one for each layer")
        lists[key] = [list(spelling)[values.index(kind)] for kind in kinds]
    if not lists:
        raise ValueError("neither attn_type_list nor layer_types is there: which layers are softmax attention?")
    name, mixers = next(iter(lists.items()))
    if any(other != mixers for other in lists.values()):
        raise ValueError(
            "attn_type_list and layer_types contradict each other: a config that native transformers has read from the "
            "hub's keys and saved looks so; correct it"
        )
    if len(mixers) != layers:
        raise ValueError(f"{name} has {len(mixers)} entries for {layers} layers")
    # What repeats is said once, as in our own configurations.
    period = next(p for p in range(1, layers + 1) if layers % p == 0 and mixers[:p] * (layers // p) == mixers)
    return mixers[:period]


def _residual(config: Mapping[str, Any]) -> tuple[float, float]:
    found = []
    for part in ("alpha", "beta"):
        values: dict[str, float] = {}
        for native, hub in _FACTORS.items():
            prefix = native if native == "mlp" else f"{native}_attn"
            keys = (f"layernorm_{hub}_{part}", f"{prefix}_{part}_factor")
            # Readers take 1 for one that is missing.
            values |= {key: _number(config, key) for key in keys if key in config} or {keys[0]: 1.0}
        if len(set(values.values())) > 1:
            raise ValueError(f"residual factors differ, and this model has one {part} for all: {values}")
        found.append(next(iter(values.values())))
    return found[0], found[1]


def _rotary(config: Mapping[str, Any], dim: int) -> tuple[float, float]:
    parameters, scaling = config.get("rope_parameters", {}), config.get("rope_scaling", {})
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise ValueError(f"{name} = {value!r}: it must be an object")
    native = has_native_heads(config)
    if native and scaling not in ({}, _as_scaling(parameters)):
        raise ValueError("rope_parameters and rope_scaling contradict each other, and transformers prefers the latter")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        # The key's older name is still read.
        kinds = [value[key] for key in ("rope_type", "type") if value.get(key) is not None]
        other = any(kind != "default" for kind in kinds) or (name == "rope_scaling" and value and not kinds)
        if other and not native:
            raise ValueError(f"{name} = {value}: only the default kind is supported")
    places = [{key: value for key, value in place.items() if value is not None} for place in (config, parameters)]
    thetas = {_number(place, "rope_theta") for place in places if "rope_theta" in place}
    if len(thetas) != 1:
        raise ValueError(f"rope_theta is {sorted(thetas) or 'missing'}: one value is needed")
    factor = "partial_rotary_factor"
    percents = {_number(place, factor) for place in places if factor in place}
    if native:
        rotated = rotary.rotated_dimensions(parameters, base=min(thetas), head_dim=dim)
        percents.add(_share(rotated, dim))
    if "rotary_dim" in config:
        percents.add(_share(_count(config, "rotary_dim"), dim))
    if len(percents) > 1:
        raise ValueError(f"rotary_dim and partial_rotary_factor contradict each other: shares {sorted(percents)}")
    return thetas.pop(), percents.pop() if percents else 1.0


def _share(rotated: int, dim: int) -> float:
    """``rotated / dim``, or the next number above where ``dim`` times it would be rounded below ``rotated``."""
    share = rotated / dim
    return share if int(dim * share) >= rotated else math.nextafter(share, math.inf)
