"""Lightning attention block of MiniMax-M1 (linear attention with a fixed decay per head)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_m1.kernels.lightning import (
    choose_backend,
    layer_slopes,
    lightning_attention,
    lightning_attention_step,
    silu_lightning_attention,
)
from megatron_m1.layers.engine import EngineConfig
from megatron_m1.layers.kind import LayerKind, Matrix
from megatron_m1.layers.norm import FullWidthRMSNorm
from megatron_m1.layers.pack import PackedBatchParams, batch_params, layout_of
from megatron_m1.parallel.lasp import lasp_attention
from megatron_m1.shapes.residual import inner_gain, output_gain

PARTS = 4
"""q, k, v and the output gate, interleaved per head in one projection."""


@dataclass
class LightningAttentionSubmodules:
    """The linears of the block: column-parallel in, row-parallel out."""

    linear_qkvg: type
    linear_proj: type


class _Split(torch.autograd.Function):
    """[n, heads, 4, dim] -> SiLU of q, of k, of v, and the gate as it is, each [n, heads, dim] and contiguous.

    torch's SiLU is several times slower on the strided slices, and autograd would make a whole gradient of zeros for
    each slice, to be added up.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> tuple[Tensor, ...]:
        raw = parts.permute(2, 0, 1, 3).contiguous()  # [4, n, heads, dim]
        ctx.save_for_backward(raw)
        *qkv, gate = raw.unbind()
        return *(nn.functional.silu(part) for part in qkv), gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (raw,) = ctx.saved_tensors
        *grads_qkv, grad_gate = grads
        raw_grads = [torch.ops.aten.silu_backward(grad, part) for grad, part in zip(grads_qkv, raw[:-1], strict=True)]
        return torch.stack([*raw_grads, grad_gate], dim=2)


class LightningCache:
    """A state a sequence, whose size never changes.

    Args:
        sequences: how many there are.
    """

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._states: Tensor | None = None

    def attend(
        self,
        active: Sequence[int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        cu_seqlens: Sequence[int],
        backend: str | None,
    ) -> Tensor:
        """Lightning attention that goes on from each sequence's state, and keeps the new ones.

        Args:
            active: the sequence of each document.
            q, k, v: [n, heads, dim], the documents of the pass.
            slopes: [heads].
            cu_seqlens: their bounds.
            backend: see ``kernels.lightning``.

        Returns:
            [n, heads, dim] in ``v``'s dtype.
        """
        if self._states is None:
            shape = (self._sequences, q.shape[1], q.shape[2], v.shape[2])
            self._states = torch.zeros(shape, dtype=torch.float32, device=q.device)
        before = self._states[active]  # [documents, heads, dim, dim]
        if q.shape[0] == len(active):
            output, after = lightning_attention_step(q, k, v, slopes, before, backend=backend)
        else:
            output, after = lightning_attention(
                q,
                k,
                v,
                slopes,
                cu_seqlens=cu_seqlens,
                initial_state=before,
                output_final_state=True,
                backend=backend,
            )
        self._states[active] = after
        return output

    def nbytes(self) -> int:
        """Memory of the states."""
        return 0 if self._states is None else self._states.nbytes


class LightningAttention(MegatronModule):
    """``out_proj(sigmoid(gate(x)) * norm(lightning(silu(q), silu(k), silu(v))))``.

    One projection holds, for each head in turn, its q, k, v and gate rows: tensor parallelism then splits by heads, and
    sequence parallelism gathers the input once. No rotary embedding, no scale, no softmax. Decay slopes depend on the
    global layer index and on the rank's heads; they are a plain fp32 attribute, since a buffer would be cast to bf16.
    Source: MiniMax-01 paper (arXiv 2501.08313), section 2.2, and the released modeling file.

    Args:
        config: engine configuration.
        submodules: linear classes.
        layer_number: global index over all layers, from 1.
        pg_collection: process groups; ``tp`` splits the heads, ``cp`` the pack.
        cp_comm_type, pp_layer_offset, name: part of megatron-core's attention interface, not needed here.
    """

    def __init__(
        self,
        config: EngineConfig,
        submodules: LightningAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        cp_comm_type: str | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        width = config.num_attention_heads * config.kv_channels
        self.head_dim = config.kv_channels
        self.local_heads = config.num_attention_heads // self.tp_group.size()
        self.recompute = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        self.backend = None if config.model.lightning_backend == "auto" else config.model.lightning_backend
        self.linear_qkvg = submodules.linear_qkvg(
            config.hidden_size,
            PARTS * width,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        self.linear_proj = submodules.linear_proj(
            width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )
        self.norm = FullWidthRMSNorm(config, width, config.model.lightning_norm_epsilon, self.tp_group, self.backend)
        with torch.device("cpu"):
            slopes = layer_slopes(config.num_attention_heads, layer_number - 1, config.num_layers)
        first = self.tp_group.rank() * self.local_heads
        self.slopes = slopes[first : first + self.local_heads]

    def _across_ranks(self, q: Tensor, k: Tensor, v: Tensor, params: PackedBatchParams, backend: str) -> Tensor:
        # The recomputed pass finds the states of the first one, and leaves the ranks alone.
        entered = params.entered_states.pop(self.layer_number, None)
        attended, entered = lasp_attention(
            q, k, v, self.slopes, layout_of(params), self.cp_group, entered=entered, backend=backend
        )
        if self.training and not torch.is_grad_enabled():
            params.entered_states[self.layer_number] = entered
        return attended

    def _core(self, qkvg: Tensor, params: PackedBatchParams) -> Tensor:
        # [n, 1, heads * 4 * dim] -> [n, heads, 4, dim]
        tokens, layout = qkvg.shape[0], layout_of(params)
        parts = qkvg.view(tokens, self.local_heads, PARTS, self.head_dim)
        self.slopes = self.slopes.to(parts.device)
        backend = choose_backend(parts.device, self.backend)
        bounds, caches = layout.local_document_bounds, params.caches
        if caches is not None:
            q, k, v, gate = _Split.apply(parts)
            cache = caches.of_layer(self.layer_number, LightningCache)
            attended = cache.attend(caches.active, q, k, v, self.slopes, bounds, backend)
        elif not layout.state_plan.is_empty:
            q, k, v, gate = _Split.apply(parts)
            attended = self._across_ranks(q, k, v, params, backend)
        elif backend == "triton":
            attended, gates = silu_lightning_attention(parts, self.slopes, cu_seqlens=bounds, backend=backend)
            gate = gates.squeeze(2)  # [n, heads, 1, dim] -> [n, heads, dim]
        else:
            q, k, v, gate = _Split.apply(parts)
            attended = lightning_attention(q, k, v, self.slopes, cu_seqlens=bounds, backend=backend)
        # [n, heads, dim] -> [n, 1, heads * dim]
        return self.norm(attended, gate).view(tokens, 1, -1)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: Any, **unused: Any
    ) -> tuple[Tensor, None]:
        """Attend within each document of the pack.

        Args:
            hidden_states: [n (/ tp with sequence parallel), 1, hidden], the normalised block input.
            attention_mask: unused; documents come from ``packed_seq_params``.
            packed_seq_params: carries the ``SequenceLayout``.
            unused: what megatron-core's layer passes to every attention (rotary embedding, inference context).

        Returns:
            The block's output, shaped and typed as ``hidden_states``, and no bias.
        """
        params = batch_params(packed_seq_params, self.cp_group.size())
        qkvg, _ = self.linear_qkvg(hidden_states)
        if self.recompute and self.training:
            core = tensor_parallel.checkpoint(partial(self._core, params=params), False, qkvg)
        else:
            core = self._core(qkvg, params)
        output, _ = self.linear_proj(core)
        return output, None


class Lightning(LayerKind):
    """The kind ``lightning``."""

    def spec(self, config: EngineConfig, provider: BackendSpecProvider) -> ModuleSpec:
        """``LightningAttention`` with the provider's linears."""
        return ModuleSpec(
            module=LightningAttention,
            submodules=LightningAttentionSubmodules(
                linear_qkvg=provider.column_parallel_linear(), linear_proj=provider.row_parallel_linear()
            ),
        )

    def matrices(
        self, module: LightningAttention, prefix: str, config: EngineConfig, groups: ProcessGroupCollection
    ) -> Iterator[tuple[Tensor, Matrix]]:
        """The query, key, value, gate and output matrices."""
        model = config.model
        width, hidden = model.num_attention_heads * model.kv_channels, model.hidden_size
        heads, dim = module.local_heads, module.head_dim
        offset = module.tp_group.rank() * heads * dim
        gains = {"q": 1.0, "k": 1.0, "v": inner_gain(model), "gate": 1.0}
        # [heads * 4 * dim, hidden] -> [heads, 4, dim, hidden]
        parts = module.linear_qkvg.weight.data.view(heads, PARTS, dim, hidden)
        for index, (part, gain) in enumerate(gains.items()):
            matrix = Matrix(f"{prefix}.attention.{part}", width, hidden, first_row=offset, gain=gain)
            yield parts[:, index], matrix
        yield (
            module.linear_proj.weight.data,
            Matrix(f"{prefix}.attention.out", hidden, width, first_column=offset, gain=output_gain(model)),
        )
