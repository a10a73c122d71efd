"""How vLLM loads and runs a MiniMax-M1 folder, written from its behaviour: names, tensor-parallel slices, forward pass.

Every rank holds parameters named as vLLM names them. A tensor in the folder finds its parameter by its own name, by the
fused ``qkv_proj`` of softmax layers, or by ``w13_weight`` / ``w2_weight`` of the experts. A name that leads nowhere is
an error, and so is a parameter, or part of one, that nothing filled. Config keys are read with vLLM's defaults, which
differ from what M1 needs. Prefill follows the recurrence: vLLM's kernel is off by one factor between blocks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

NORM_EPSILON = 1e-5
"""vLLM's, inside lightning layers; M1's own code has 1e-6."""
_EXPERT = re.compile(r"(model\.layers\.\d+\.block_sparse_moe\.experts)\.(\d+)\.w([123])\.weight")
_QKV = re.compile(r"(model\.layers\.(\d+)\.self_attn)\.([qkv])_proj\.weight")


class Config:
    """config.json as vLLM reads it."""

    def __init__(self, folder: Path) -> None:
        keys: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.hidden: int = keys["hidden_size"]
        self.heads: int = keys["num_attention_heads"]
        self.kv_heads: int = keys["num_key_value_heads"]
        self.dim: int = keys.get("head_dim", self.hidden // self.heads)
        self.inner: int = keys["intermediate_size"]
        self.experts: int = keys["num_local_experts"]
        self.topk: int = keys["num_experts_per_tok"]
        self.layers: int = keys["num_hidden_layers"]
        self.vocab: int = keys["vocab_size"]
        self.eps: float = keys["rms_norm_eps"]
        self.types: list[int] = keys.get("attn_type_list") or [1] * self.layers
        self.postnorm: bool = keys.get("postnorm", False)
        self.rotary_dim: int = keys.get("rotary_dim", self.dim)
        self.theta: float = int(keys.get("rope_theta", 10_000))
        self.factors = {
            part: [keys.get(f"layernorm_{part}_{name}", 1) for name in ("alpha", "beta")]
            for part in ("linear_attention", "full_attention", "mlp")
        }


class Rank:
    """One tensor-parallel rank's parameters."""

    def __init__(self, config: Config, rank: int, size: int) -> None:
        self.config, self.rank, self.size = config, rank, size
        self.parameters = {name: torch.full(shape, math.nan) for name, shape in self._shapes().items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        c, size = self.config, self.size
        wide, narrow = c.heads * c.dim // size, c.kv_heads * c.dim // size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (c.vocab // size, c.hidden),
            "lm_head.weight": (c.vocab // size, c.hidden),
            "model.norm.weight": (c.hidden,),
        }
        for layer, kind in enumerate(c.types):
            name = f"model.layers.{layer}"
            attention, experts = f"{name}.self_attn", f"{name}.block_sparse_moe"
            shapes |= {
                f"{name}.input_layernorm.weight": (c.hidden,),
                f"{name}.post_attention_layernorm.weight": (c.hidden,),
                f"{experts}.gate.weight": (c.experts, c.hidden),
                f"{experts}.experts.w13_weight": (c.experts, 2 * c.inner // size, c.hidden),
                f"{experts}.experts.w2_weight": (c.experts, c.hidden, c.inner // size),
            }
            if kind == 1:
                shapes |= {
                    f"{attention}.qkv_proj.weight": (wide + 2 * narrow, c.hidden),
                    f"{attention}.o_proj.weight": (c.hidden, wide),
                }
            else:
                shapes |= {
                    f"{attention}.qkv_proj.weight": (3 * wide, c.hidden),
                    f"{attention}.output_gate.weight": (wide, c.hidden),
                    f"{attention}.out_proj.weight": (c.hidden, wide),
                    f"{attention}.norm.weight": (wide,),
                }
        return shapes

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Consume every weight.

        Raises:
            KeyError: a name leads to no parameter.
            ValueError: a shape does not fit, or a parameter is not filled completely.
        """
        for name, value in weights.items():
            self._load_one(name, value.float())
        gaps = [name for name, value in self.parameters.items() if value.isnan().any()]
        if gaps:
            raise ValueError(f"nothing fills {gaps}")

    def _load_one(self, name: str, value: Tensor) -> None:
        if expert := _EXPERT.fullmatch(name):
            which, half = int(expert[2]), int(expert[3])
            stack = self.parameters[f"{expert[1]}.{'w2' if half == 2 else 'w13'}_weight"][which]
            if half == 2:
                self._put(stack, value, dim=1)
            else:
                self._put(stack.chunk(2)[half // 2], value, dim=0)
        elif (part := _QKV.fullmatch(name)) and self.config.types[int(part[2])] == 1:
            fused = self.parameters[f"{part[1]}.qkv_proj.weight"]
            narrow = self.config.kv_heads * self.config.dim // self.size
            pieces = fused.split([fused.shape[0] - 2 * narrow, narrow, narrow])
            self._put(pieces["qkv".index(part[3])], value, dim=0)
        else:
            target = self.parameters[name]
            differs = [dim for dim in range(value.dim()) if target.shape[dim] != value.shape[dim]]
            self._put(target, value, dim=differs[0] if differs else 0)

    def _put(self, target: Tensor, whole: Tensor, dim: int) -> None:
        share = whole if whole.shape == target.shape else whole.chunk(self.size, dim=dim)[self.rank]
        if share.shape != target.shape:
            raise ValueError(f"{tuple(whole.shape)} does not fit {tuple(target.shape)} on {self.size} ranks")
        target.copy_(share)


class Model:
    """All ranks in one process; what vLLM all-reduces is added up here."""

    def __init__(self, folder: Path, size: int, norm_epsilon: float = NORM_EPSILON) -> None:
        self.config, self.norm_epsilon = Config(folder), norm_epsilon
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        self.ranks = [Rank(self.config, rank, size) for rank in range(size)]
        for rank in self.ranks:
            rank.load(weights)

    def _of(self, name: str) -> list[Tensor]:
        return [rank.parameters[name] for rank in self.ranks]

    def logits(self, tokens: Tensor) -> Tensor:
        """fp32 logits [n, vocab] of one sequence of token ids [n]."""
        c = self.config
        x = torch.cat(self._of("model.embed_tokens.weight"))[tokens]
        for layer, kind in enumerate(c.types):
            name = f"model.layers.{layer}"
            y = _norm(x, self._of(f"{name}.input_layernorm.weight")[0], c.eps)
            attend = self._softmax if kind == 1 else self._lightning
            x = self._add("full_attention" if kind == 1 else "linear_attention", x, y, attend(layer, y))
            y = _norm(x, self._of(f"{name}.post_attention_layernorm.weight")[0], c.eps)
            x = self._add("mlp", x, y, self._experts(f"{name}.block_sparse_moe", y))
        x = _norm(x, self._of("model.norm.weight")[0], c.eps)
        return torch.cat([x @ weight.T for weight in self._of("lm_head.weight")], dim=-1)

    def _add(self, part: str, before: Tensor, normalised: Tensor, output: Tensor) -> Tensor:
        alpha, beta = self.config.factors[part]
        return alpha * (normalised if self.config.postnorm else before) + beta * output

    def _lightning(self, layer: int, y: Tensor) -> Tensor:
        c, name = self.config, f"model.layers.{layer}.self_attn"
        slopes = 2.0 ** (-8.0 * torch.arange(1, c.heads + 1) / c.heads) * (1 - layer / (c.layers - 1) + 1e-5)
        cores = []
        for rank, weight in enumerate(self._of(f"{name}.qkv_proj.weight")):
            q, k, v = silu(y @ weight.T).view(y.shape[0], -1, 3 * c.dim).split(c.dim, dim=-1)
            decay = torch.exp(-slopes.chunk(len(self.ranks))[rank])[:, None, None]
            state, rows = torch.zeros(q.shape[1], c.dim, c.dim), []
            for t in range(y.shape[0]):
                state = decay * state + k[t, :, :, None] * v[t, :, None, :]
                rows.append(torch.einsum("hd,hde->he", q[t], state).flatten())
            cores.append(torch.stack(rows))
        variance = torch.stack([core.square().mean(-1, keepdim=True) for core in cores]).mean(0)
        total = torch.zeros_like(y)
        for core, norm, gate, out in zip(
            cores, *(self._of(f"{name}.{part}.weight") for part in ("norm", "output_gate", "out_proj")), strict=True
        ):
            total += (torch.sigmoid(y @ gate.T) * (core * torch.rsqrt(variance + self.norm_epsilon) * norm)) @ out.T
        return total

    def _softmax(self, layer: int, y: Tensor) -> Tensor:
        c, name = self.config, f"model.layers.{layer}.self_attn"
        n, narrow = y.shape[0], c.kv_heads * c.dim // len(self.ranks)
        total = torch.zeros_like(y)
        for weight, out in zip(self._of(f"{name}.qkv_proj.weight"), self._of(f"{name}.o_proj.weight"), strict=True):
            q, k, v = (y @ weight.T).split([weight.shape[0] - 2 * narrow, narrow, narrow], dim=-1)
            q, k, v = (part.reshape(n, -1, c.dim).transpose(0, 1) for part in (q, k, v))
            q, k = self._rotate(q), self._rotate(k)
            k, v = (part.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for part in (k, v))
            scores = (q @ k.mT) / c.dim**0.5 + torch.full((n, n), -math.inf).triu(1)
            total += (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1) @ out.T
        return total

    def _rotate(self, x: Tensor) -> Tensor:
        half = self.config.rotary_dim // 2
        angles = torch.arange(x.shape[1])[:, None] * self.config.theta ** -(torch.arange(half) / half)
        turned = torch.polar(torch.ones_like(angles), angles) * torch.complex(x[..., :half], x[..., half : 2 * half])
        return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)

    def _experts(self, name: str, y: Tensor) -> Tensor:
        probabilities = (y @ self._of(f"{name}.gate.weight")[0].T).softmax(-1)
        weights, chosen = probabilities.topk(self.config.topk)
        weights = weights / weights.sum(-1, keepdim=True)
        rows = []
        for t in range(y.shape[0]):
            row = torch.zeros_like(y[t])
            for weight, expert in zip(weights[t], chosen[t].tolist(), strict=True):
                for w13, w2 in zip(
                    self._of(f"{name}.experts.w13_weight"), self._of(f"{name}.experts.w2_weight"), strict=True
                ):
                    gate, up = (w13[expert] @ y[t]).chunk(2)
                    row += weight * (w2[expert] @ (silu(gate) * up))
            rows.append(row)
        return torch.stack(rows)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
