"""A model to evaluate on any mesh: the modules of training with a checkpoint's weights, and nothing that trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_m1.checkpoint.state import load_weights
from megatron_m1.checkpoint.store import check_undamaged
from megatron_m1.config import ResolvedConfig
from megatron_m1.evaluation.plan import padded_tokens
from megatron_m1.parallel.balance import ModelCost
from megatron_m1.plan.flops import layout_cost
from megatron_m1.runtime.mesh import Mesh
from megatron_m1.training.trained_model import build_chunks


@dataclass(frozen=True)
class EvaluatedModel:
    """One rank's share of a model: no gradient buffers, no optimizer."""

    mesh: Mesh
    config: ResolvedConfig
    chunks: list[GPTModel]
    """Pipeline chunks of this rank, bare and in evaluation mode."""
    seq_length: int
    """Tokens of a pack, at most."""
    pack_tokens: int
    """Tokens of a pack once its end is padded."""
    cost: ModelCost | None
    """What layouts balance over context-parallel ranks."""
    beat: Callable[[], None]

    def heartbeat(self) -> None:
        """Called before every micro-batch's forward pass."""
        self.beat()

    def with_length(self, tokens: int) -> EvaluatedModel:
        """Return the same model for packs of up to ``tokens``."""
        return replace(self, seq_length=tokens, pack_tokens=padded_tokens(tokens, self.config))


def open_model(config: ResolvedConfig, mesh: Mesh, checkpoint: Path, beat: Callable[[], None]) -> EvaluatedModel:
    """Build this rank's chunks and load a checkpoint of any mesh into them. Collective.

    Args:
        config: of the checkpoint, on this mesh.
        mesh: from ``mesh.initialise``.
        checkpoint: ``.../step_<number>``.
        beat: called before every micro-batch, so that none is taken for a hang.

    Raises:
        ValueError: the checkpoint is damaged or of another model.
    """
    chunks = build_chunks(config, mesh)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    model = EvaluatedModel(
        mesh, config, chunks, config.data.seq_length, config.padded_pack_tokens, layout_cost(config.model), beat
    )
    check_undamaged(checkpoint)
    load_weights(model, checkpoint)
    return model
