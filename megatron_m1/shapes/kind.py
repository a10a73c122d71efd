"""What one kind of sub-layer says of itself: a mixer, in which tokens meet, or a feed-forward network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from megatron_m1.config.resolved import ResolvedParallelConfig
from megatron_m1.config.tree import ModelConfig


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model."""

    name: str
    """Its key in a checkpoint, below that of the sub-layer: ``linear_proj.weight``."""
    shape: tuple[int, ...]
    """Over all ranks; of one copy."""
    group: str
    """Row of the tables in which it is counted."""
    split: Literal["none", "tensor", "expert"] = "none"
    """Which ranks share it: none, the tensor ranks, or the expert ranks and those of expert tensor parallelism. The
    copies of the last kind are one tensor in a checkpoint, stacked along a dimension in front."""
    copies: int = 1
    """How many there are, one an expert."""
    used: int = 1
    """Of the copies, how many one token passes through."""
    is_fp32: bool = False
    """Kept in fp32 whatever the others are."""

    @property
    def total(self) -> int:
        """Numbers in all copies."""
        return self.copies * math.prod(self.shape)

    @property
    def active(self) -> int:
        """Numbers that one token passes through."""
        return self.used * math.prod(self.shape)

    def held(self, parallel: ResolvedParallelConfig) -> int:
        """Numbers that one rank has."""
        ranks = {
            "none": 1,
            "tensor": parallel.tensor_model_parallel_size,
            "expert": parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size,
        }
        return self.total // ranks[self.split]

    def pieces(self, parallel: ResolvedParallelConfig) -> tuple[int, int]:
        """How many tensors of it one rank has, and the numbers of each."""
        of_experts = self.split == "expert"
        count = self.copies // (parallel.expert_model_parallel_size if of_experts else 1)
        return count, self.held(parallel) // count


@dataclass(frozen=True)
class Share:
    """One micro-batch as one rank has it, and how the rank computes."""

    parallel: ResolvedParallelConfig
    tokens: int
    """Of the pack, that the rank's context-parallel place has."""
    itemsize: int
    """Bytes of a number of activations: 4 or 2."""
    on_gpu: bool
    """Kernels of GPUs keep other things than those of CPUs."""
    recomputed: frozenset[str] = frozenset()
    """Modules that the backward pass computes again: core_attn, moe."""

    @property
    def tensor(self) -> int:
        """Ranks that share heads and matrices."""
        return self.parallel.tensor_model_parallel_size

    @property
    def outside(self) -> int:
        """Tokens of a rank where sequence parallelism splits them: outside mixers and experts."""
        return self.tokens // self.tensor if self.parallel.sequence_parallel else self.tokens

    @property
    def entering_states(self) -> int:
        """States that enter the segments of the fullest rank, of a pack that is one document in zigzag order."""
        return 2 if self.parallel.context_parallel_size > 1 else 0


type Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]


@dataclass(frozen=True)
class Message:
    """What one rank exchanges in one micro-batch, in bytes of whole messages.

    Whole: of all ranks' parts where they are gathered, scattered or added; of what the rank sends where it sends.
    """

    group: str
    """As ``plan.ranks`` names groups: TP, CP, EP, ETP, or several with ``x`` between."""
    collective: Collective
    forward: float
    backward: float
    module: str = ""
    """That recomputation may name, in which the forward message is sent."""
    is_repeated: bool = True
    """A forward pass that is computed again sends it again."""

    def sent(self, recomputed: frozenset[str], *, layers_again: bool) -> float:
        """Bytes of a micro-batch; ``layers_again``: whole layers are computed again."""
        again = self.is_repeated and (layers_again or self.module in recomputed)
        return self.forward * (2 if again else 1) + self.backward


def parallel_linears(model: ModelConfig, share: Share) -> list[Message]:
    """Messages of a sub-layer whose first matrix is split by columns and whose last one by rows.

    Tokens are gathered before the first one, and again for its gradient, as are the output's gradients; the output and
    the input's gradients are scattered.
    """
    size = share.tokens * model.hidden_size * share.itemsize
    return [Message("TP", "all-gather", size, 2 * size), Message("TP", "reduce-scatter", size, size)]


class LayerShape(ABC):
    """A kind of sub-layer, of any model: it holds nothing, and reads its sizes from the model's configuration.

    Checks are there to be overridden where a kind has something to check.
    """

    @abstractmethod
    def parameters(self, model: ModelConfig) -> list[Parameter]:
        """All parameters of one sub-layer."""

    @abstractmethod
    def flops_per_token(self, model: ModelConfig) -> int:
        """Useful floating-point operations of the forward pass for each token, see ``plan.flops``."""

    def flops_parts(self, model: ModelConfig) -> dict[str, int]:
        """``flops_per_token`` by row of the tables; one row unless the kind has several."""
        return {self.parameters(model)[0].group: self.flops_per_token(model)}

    @abstractmethod
    def saved_bytes(self, model: ModelConfig, share: Share) -> int:
        """Bytes that one rank keeps of one micro-batch for the backward pass, the sub-layer's input included.

        Of a pack that is one document. What is computed again (``share.recomputed``) is not kept; states that come from
        other ranks are counted in ``MixerShape.state_bytes``.
        """

    def check(self, model: ModelConfig) -> None:  # noqa: B027
        """Check the fields of ``model`` that this kind reads.

        Raises:
            ValueError: one line that names the value and the fix.
        """

    def check_split(self, model: ModelConfig, parallel: ResolvedParallelConfig) -> None:  # noqa: B027
        """Check that the mesh can cut this kind. Heads and groups are checked for every model.

        Raises:
            ValueError: one line that names the value and the fix.
        """

    def check_device(self, model: ModelConfig, *, precision: str, has_gpu: bool) -> None:  # noqa: B027
        """Check that this kind runs on the device, in ``precision`` (fp32 or bf16).

        Raises:
            ValueError: one line that names the value and the fix.
        """

    def messages(self, model: ModelConfig, share: Share) -> list[Message]:
        """What a rank exchanges in a micro-batch, also over groups of one rank; default: as ``parallel_linears``."""
        return parallel_linears(model, share)

    def working_bytes(self, model: ModelConfig, share: Share) -> int:
        """Most bytes that the sub-layer's backward pass needs for a while, besides what is kept."""
        return 0

    def exchange_bytes(self, model: ModelConfig, share: Share) -> int:
        """Most bytes that the sub-layer's exchanges with other ranks need for a while."""
        return 0


class MixerShape(LayerShape):
    """A kind of sub-layer in which the tokens of a document meet: attention and the like."""

    def flops_per_pair(self, model: ModelConfig) -> int:
        """Forward operations for each (query, key) pair of a causal document; 0 where work is linear in its length."""
        return 0

    def state_bytes(self, model: ModelConfig) -> int:
        """Bytes of what a sequence carries on whatever its length, in generation and from segment to segment."""
        return 0

    def cache_bytes_per_token(self, model: ModelConfig, itemsize: int) -> int:
        """Bytes that generation keeps of every token, in numbers of ``itemsize`` bytes."""
        return 0


class FfnShape(LayerShape):
    """A kind of sub-layer that every token passes through by itself."""


def check_divides(name: str, value: int, size_name: str, size: int) -> None:
    """Check that a mesh's size divides a model's.

    Raises:
        ValueError: one line that names the value and the fix.
    """
    if value % size:
        raise ValueError(
            f"{name} = {value} is not divisible by parallel.{size_name} = {size}: use a size that divides it, such as "
            f"{math.gcd(value, size)}"
        )
