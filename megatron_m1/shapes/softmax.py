"""Softmax attention with grouped keys and values, and rotary positions on a share of each head."""

from __future__ import annotations

import math

from megatron_m1.config.tree import ModelConfig
from megatron_m1.shapes.kind import Message, MixerShape, Parameter, Share, parallel_linears

GROUP = "softmax attention"
MOST_FLASH_CHANNELS = 256
"""Of a head, in torch's flash kernel."""


def rotary_dim(model: ModelConfig) -> int:
    """Dimensions of each head that are rotated."""
    return int(model.kv_channels * model.rotary_percent)


class Softmax(MixerShape):
    """With hidden size h, A = heads x kv_channels and G = query groups x kv_channels: q, k, v [A + 2 G, h], out [h, A].

    The forward pass is ``2 x 2 h A + 2 x 2 h G`` for the matrices, and ``2 x 2 A`` for a pair of query and key.
    """

    def parameters(self, model: ModelConfig) -> list[Parameter]:
        """All parameters of one sub-layer."""
        hidden, inner = model.hidden_size, model.num_attention_heads * model.kv_channels
        key_value = model.num_query_groups * model.kv_channels
        return [
            Parameter("linear_qkv.weight", (inner + 2 * key_value, hidden), GROUP, "tensor"),
            Parameter("linear_proj.weight", (hidden, inner), GROUP, "tensor"),
        ]

    def flops_per_token(self, model: ModelConfig) -> int:
        """The projections."""
        width = (model.num_attention_heads + model.num_query_groups) * model.kv_channels
        return 4 * model.hidden_size * width

    def flops_per_pair(self, model: ModelConfig) -> int:
        """Scores, and the weighted sum of values."""
        return 4 * model.num_attention_heads * model.kv_channels

    def saved_bytes(self, model: ModelConfig, share: Share) -> int:
        """Input; projection A + 2 G, in which v lies; q A and k G rotated, sine and cosine of both; output A; LSE.

        On a CPU without context parallelism the output is there twice: of each document, and put together.
        """
        heads = model.num_attention_heads // share.tensor
        inner = heads * model.kv_channels
        # With fewer groups than ranks, all ranks have the whole projection and take a slice.
        groups = max(1, model.num_query_groups // share.tensor)
        few = model.num_query_groups < share.tensor
        key_value = groups * model.kv_channels
        width = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
        projected = width if few else inner + 2 * key_value
        before = share.outside * model.hidden_size * share.itemsize
        if "core_attn" in share.recomputed:
            return before + share.tokens * (projected + inner) * share.itemsize
        is_copied = not share.on_gpu and share.parallel.context_parallel_size == 1
        numbers = projected + inner + key_value + (2 if is_copied else 1) * inner
        return before + share.tokens * (numbers * share.itemsize + 4 * 2 * rotary_dim(model) + 4 * heads)

    def working_bytes(self, model: ModelConfig, share: Share) -> int:
        """Gradients of the matrices, and of queries, keys, values, output and projection."""
        inner = model.num_attention_heads * model.kv_channels // share.tensor
        key_value = max(1, model.num_query_groups // share.tensor) * model.kv_channels
        matrices = 2 * (inner + key_value) * model.hidden_size
        return (matrices + share.tokens * (4 * inner + 4 * key_value)) * share.itemsize

    def exchange_bytes(self, model: ModelConfig, share: Share) -> int:
        """Ring: two blocks of keys and values, and the fp32 gradients of three."""
        if share.parallel.context_parallel_size == 1:
            return 0
        key_value = max(1, model.num_query_groups // share.tensor) * model.kv_channels
        return share.tokens * 2 * key_value * (2 * share.itemsize + 3 * 4)

    def messages(self, model: ModelConfig, share: Share) -> list[Message]:
        """Besides the linears' the ring's, of the rank that sends most, for a pack of one document in zigzag order.

        Of 2 R segments rank r has r and 2 R - 1 - r. All others attend to the first, the ranks before it to the second:
        the last rank sends both to all, and gets the first one of each.
        """
        ranks = share.parallel.context_parallel_size
        key_value = max(1, model.num_query_groups // share.tensor) * model.kv_channels
        sent, received = (ranks - 1) * share.tokens, (ranks - 1) * share.tokens / 2
        keys, gradients = 2 * key_value * share.itemsize, 2 * key_value * 4
        found = [
            *parallel_linears(model, share),
            Message("CP", "send", sent * keys, sent * keys + received * gradients, module="core_attn"),
        ]
        if model.num_query_groups < share.tensor:
            # megatron-core puts the whole projection together, and each rank takes its heads' groups.
            width = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
            size = share.tokens * width * share.itemsize
            found += [Message("TP", "all-gather", size, 0), Message("TP", "reduce-scatter", 0, size)]
        return found

    def cache_bytes_per_token(self, model: ModelConfig, itemsize: int) -> int:
        """A key and a value a group."""
        return 2 * model.num_query_groups * model.kv_channels * itemsize

    def check(self, model: ModelConfig) -> None:
        """Groups divide heads, and the rotated share of a head is an even number of dimensions.

        Raises:
            ValueError: they don't, or it is not.
        """
        if model.num_attention_heads % model.num_query_groups:
            raise ValueError(
                f"model.num_attention_heads = {model.num_attention_heads} is not divisible by model.num_query_groups = "
                f"{model.num_query_groups}: every key/value head serves equally many query heads"
            )
        rotated = model.kv_channels * model.rotary_percent
        even = 2 * round(rotated / 2)
        # ``rotary_dim`` rounds down.
        if model.rotary_percent > 1 or not math.isclose(rotated, even) or rotary_dim(model) != even:
            raise ValueError(
                f"model.rotary_percent = {model.rotary_percent} of model.kv_channels = {model.kv_channels} rotates "
                f"{rotated:g} dimensions: it must be an even number up to {model.kv_channels}"
            )

    def check_device(self, model: ModelConfig, *, precision: str, has_gpu: bool) -> None:
        """On a GPU it is torch's flash kernel.

        Raises:
            ValueError: that one takes no fp32, or no heads of this width.
        """
        if has_gpu and precision == "fp32":
            raise ValueError(
                "train.precision = fp32 on GPUs: softmax attention is torch's flash kernel there, which takes 16 bits; "
                "give bf16 or auto"
            )
        if has_gpu and (model.kv_channels % 8 or model.kv_channels > MOST_FLASH_CHANNELS):
            raise ValueError(
                f"model.kv_channels = {model.kv_channels} on GPUs: torch's flash kernel takes multiples of 8 up to "
                f"{MOST_FLASH_CHANNELS}"
            )
