"""Useful floating-point operations of one training step.

Convention ("useful FLOPs", also called model FLOPs): what the mathematics asks for, whichever way it is computed.

- A product of [m, k] and [k, n] is 2 m k n. The backward pass is two such products per forward product, so a training
  step is 3 times the forward pass. Recomputed activations are not counted.
- Softmax attention counts the causal pairs inside each document, n (n + 1) / 2, and nothing across documents.
- Lightning attention counts its recurrence: the update of the state, k^T v, and its reading, q S. The quadratic
  products inside a chunk that a fast kernel adds are not counted.
- Every token counts its top-k experts, also where an expert's capacity drops it.
- Embedding look-up, norms, activations, rotary, softmax, decay and the optimizer are not counted, nor is the padding
  of the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megatron_m1.config import ModelConfig
from megatron_m1.parallel.balance import ModelCost
from megatron_m1.plan.hardware import peak_bf16_flops as peak_bf16_flops  # for what measures a run's utilisation
from megatron_m1.plan.parameters import HEAD
from megatron_m1.shapes.kind import MixerShape
from megatron_m1.shapes.registry import FFNS, MIXERS, layer_ffns, layer_mixers

FLOPS_PER_BYTE = 8000.0
"""What an H100 computes at 40% of its BF16 peak while 50 GB/s of network (400 Gbit/s a GPU) bring one byte."""


def layout_cost(config: ModelConfig) -> ModelCost:
    """What the layout of a pack over context-parallel ranks balances: FLOPs of forward and backward.

    The states of one more segment are float32, travel in both directions, and are weighed with ``FLOPS_PER_BYTE``.
    """
    state_bytes = sum(count * mixer.state_bytes(config) for mixer, count in _mixers(config))
    return ModelCost(
        3.0 * _forward_flops_per_token(config),
        3.0 * _forward_flops_per_pair(config),
        FLOPS_PER_BYTE * 2 * state_bytes,
    )


def training_flops(model_config: ModelConfig, document_lengths: Iterable[int]) -> int:
    """Return the useful FLOPs of forward and backward over one pack, on all ranks together.

    With T tokens in documents of n_i, hidden size h and vocabulary V, the forward pass is ``T 2 h V`` for the head and,
    for every layer, T times what its two kinds say of a token (``shapes``) and ``sum_i n_i (n_i + 1) / 2`` times what
    its mixer says of a pair.

    Args:
        model_config: the model.
        document_lengths: tokens of each document of the pack.

    Raises:
        ValueError: a length below 1.
    """
    lengths = list(document_lengths)
    if any(length < 1 for length in lengths):
        raise ValueError(f"a document has {min(lengths)} tokens; document_lengths must be 1 or more")
    tokens = sum(lengths)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return 3 * (tokens * _forward_flops_per_token(model_config) + pairs * _forward_flops_per_pair(model_config))


def flops_by_part(model: ModelConfig, document_length: int) -> dict[str, float]:
    """Forward and backward FLOPs of a token of documents of one length, by part: mixers by kind, experts, router, head.

    torch's ``flop_counter`` counts the same for plain modules. It does not count what is no operation of torch's
    own (Triton's kernels, oneDNN's products on a CPU), and it counts more where a kernel does more than the mathematics
    asks for: the products inside the chunks of lightning attention, all pairs of a masked softmax.
    """
    found: dict[str, float] = {}
    pairs = (document_length + 1) / 2
    for mixer, count in _mixers(model):
        for part, flops in mixer.flops_parts(model).items():
            found[part] = found.get(part, 0) + count * flops
        group = next(iter(mixer.flops_parts(model)))
        found[group] += count * mixer.flops_per_pair(model) * pairs
    for name, count in Counter(layer_ffns(model)).items():
        for part, flops in FFNS[name].flops_parts(model).items():
            found[part] = found.get(part, 0) + count * flops
    found[HEAD] = 2 * model.hidden_size * model.vocab_size
    return {part: 3 * flops for part, flops in found.items()}


def _mixers(config: ModelConfig) -> list[tuple[MixerShape, int]]:
    """The kinds of mixers of a model, and how many layers have each."""
    return [(MIXERS[name], count) for name, count in Counter(layer_mixers(config)).items()]


def _forward_flops_per_token(config: ModelConfig) -> int:
    mixers = sum(count * mixer.flops_per_token(config) for mixer, count in _mixers(config))
    ffns = sum(count * FFNS[name].flops_per_token(config) for name, count in Counter(layer_ffns(config)).items())
    return mixers + ffns + 2 * config.hidden_size * config.vocab_size


def _forward_flops_per_pair(config: ModelConfig) -> int:
    return sum(count * mixer.flops_per_pair(config) for mixer, count in _mixers(config))
