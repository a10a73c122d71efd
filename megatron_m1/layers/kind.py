"""What one kind of sub-layer brings to the model: its modules, and how its matrices begin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_m1.layers.engine import EngineConfig


@dataclass(frozen=True)
class Matrix:
    """A logical weight matrix and the slice of it that one rank holds.

    Args:
        name: global name, the same on every mesh.
        rows, columns: full shape [fan_out, fan_in].
        first_row, first_column: where the held slice starts.
        gain: Xavier gain.
    """

    name: str
    rows: int
    columns: int
    first_row: int = 0
    first_column: int = 0
    gain: float = 1.0


class LayerKind(ABC):
    """A kind of sub-layer, mixer or feed-forward network, whose sizes ``shapes`` knows under the same name.

    A mixer that generation should run keeps what a sequence carries from pass to pass in ``layers.caches``.
    """

    @abstractmethod
    def spec(self, config: EngineConfig, provider: BackendSpecProvider) -> Any:
        """What megatron-core's ``TransformerLayerSubmodules`` takes as ``self_attention`` or ``mlp``."""

    @abstractmethod
    def matrices(
        self, module: Any, prefix: str, config: EngineConfig, groups: ProcessGroupCollection
    ) -> Iterator[tuple[Tensor, Matrix]]:
        """Every matrix of a built sub-layer: the memory that this rank has of it, and what belongs there.

        Norms and other vectors are left as the module made them.

        Args:
            module: what ``spec`` builds.
            prefix: the layer's global name, ``layers.3``, with which the names of its matrices begin.
            config: of the model.
            groups: of the model.
        """

    def expert_parameters(self, module: Any) -> Iterable[nn.Parameter]:
        """The parameters that expert ranks split among them, so that the others' data parallelism is not theirs."""
        return ()
