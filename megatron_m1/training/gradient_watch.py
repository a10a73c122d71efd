"""What is looked at between the backward pass and the update: the gradient's norm, its parts, and spikes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_m1.config import ResolvedConfig
from megatron_m1.data.packed import DocumentPiece, PackedSample
from megatron_m1.data.tokenizers import load_tokenizer
from megatron_m1.files import refusal, write_atomically
from megatron_m1.training.figures import Figure
from megatron_m1.training.gradient_norms import gradient_norms
from megatron_m1.training.spike_documents import batch_documents, documents_path, write_documents
from megatron_m1.training.spike_guard import Spike, SpikeError, SpikeGuard
from megatron_m1.training.trained_model import TrainedModel

SPIKES = Figure("spikes", "spikes {}", hides_zero=True, importance=8)
"""Of the run so far, also of steps that going back to a checkpoint has undone."""


class GradientWatch:
    """Watches a run's gradients. One on every rank, asked in every step.

    Attributes:
        guard: judges norms.
        spike: the last step's, if it had one.
        norms: the last step's gradient norms by kind and depth, in a step that records them.
    """

    def __init__(self, config: ResolvedConfig, trained: TrainedModel, note: Callable[[str], None]) -> None:
        self._config = config
        self._trained = trained
        self._note = note
        self._tokenizer = load_tokenizer(config.data.tokenizer) if config.train.spike_guard != "off" else None
        self.guard = SpikeGuard(config.train)
        self.spike: Spike | None = None
        self.norms: dict[Figure, float] = {}

    def of_step(self, step: int) -> Callable[[float], bool]:
        """What ``train_step`` asks, with the norm of the gradients of ``step``, whether they are applied."""
        self.spike, self.norms = None, {}
        return partial(self._admits, step)

    def _admits(self, step: int, norm: float) -> bool:
        self.spike = self.guard.judge(step, norm)
        interval = self._config.train.grad_norm_interval
        if self.spike is not None or (interval and step % interval == 0):
            self.norms = gradient_norms(self._trained)
        return self.spike is None or self.guard.applies_spikes

    @property
    def goes_back(self) -> bool:
        """Whether the last step asks for the newest checkpoint."""
        return self.spike is not None and self._config.train.spike_guard == "rollback"

    def tell(self, samples: list[PackedSample], pieces: Callable[[], list[list[DocumentPiece]]]) -> None:
        """Write what the last step's batch is made of, if it had a spike, and say where. Collective.

        Args:
            samples: this rank's packs of the batch.
            pieces: gives what they are made of.
        """
        if self.spike is None:
            return
        assert self._tokenizer is not None
        records = batch_documents(self._trained, samples, pieces(), self._tokenizer)
        if self._trained.mesh.rank != 0:
            return
        path = documents_path(Path(self._config.run.folder), self.spike.step, self.spike.number)
        what = "applied" if self.guard.applies_spikes else "not applied"
        try:
            write_documents(path, records)
            write_atomically(path.with_suffix(".json"), (json.dumps(self._facts(self.spike), indent=2) + "\n").encode())
        except OSError as error:
            self._note(f"{self.spike}: {what}; {path} can't be written: {refusal(error, path.parent)}")
        else:
            self._note(f"{self.spike}: {what}; its documents by loss: {path}")

    def _facts(self, spike: Spike) -> dict[str, int | float]:
        """What is known of the step besides its documents: going back drops its record."""
        facts = {"step": spike.step, "spike": spike.number, "grad_norm": spike.norm, "median": spike.median}
        return facts | {figure.name: value for figure, value in self.norms.items()}

    def check(self) -> None:
        """End the run if the last step's spike is one too many.

        Raises:
            SpikeError: it is.
        """
        reason = None if self.spike is None else self.guard.end_of_run(self.spike)
        if reason is not None:
            raise SpikeError(reason)
