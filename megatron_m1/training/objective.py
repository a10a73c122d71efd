"""What training minimises: from the loss of every token to one number. The rest of a step is the same for all."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_m1.config import TrainConfig
from megatron_m1.data.packed import PackedSample
from megatron_m1.training.figures import Figure
from megatron_m1.training.microbatch import MicroBatch, document_labels


class Objective(Protocol):
    """The loss of a global batch is ``sum / weight``, both added up over all its packs and ranks.

    It may keep no state: every rank has its own, and a checkpoint none of it.
    """

    @property
    def figures(self) -> tuple[Figure, ...]:
        """What ``total`` reports besides the loss, in the order in which it is shown."""

    def weight(self, sample: PackedSample) -> Tensor:
        """Return what a whole pack adds to the divisor, 0 or more: a scalar, any fraction.

        It comes from the pack alone and not from the model, because the auxiliary loss of the experts has to be scaled
        with the divisor before the backward pass begins.
        """

    def total(self, losses: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[Figure, Tensor]]:
        """Add up one rank's part of a pack.

        Args:
            losses: fp32 [1, n], negative log-likelihood of each label of ``batch`` in nats, with its gradient. Padding
                has one too: it counts only with a ``loss_mask`` that is not 0.
            batch: the same n tokens, with whatever ``extra`` the pack carries.

        Returns:
            The scalar whose gradient is taken, and for each of ``figures`` a scalar; all are sums, and are reported
            divided by the batch's weight.
        """


class NextToken:
    """Mean negative log-likelihood of the labels that ``loss_mask`` leaves."""

    figures: tuple[Figure, ...] = ()

    def weight(self, sample: PackedSample) -> Tensor:
        """Return the number of predicted tokens."""
        return sample.loss_mask.sum()

    def total(self, losses: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[Figure, Tensor]]:
        """Return the loss of the predicted tokens."""
        return (losses.float() * batch.loss_mask).sum(), {}


class EverySample:
    """Mean over documents of the mean negative log-likelihood of the labels that ``loss_mask`` leaves in each.

    A document is what the bounds of a pack make one: a conversation, however long its answers are. The piece of one
    that is cut at a pack's end counts as a document; nothing here knows the rest of it. Documents without a label do
    not count.
    """

    figures: tuple[Figure, ...] = ()

    def weight(self, sample: PackedSample) -> Tensor:
        """Return the number of documents with a label."""
        return (document_labels(sample) > 0).sum()

    def total(self, losses: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[Figure, Tensor]]:
        """Return the sum of the documents' means, as far as their tokens are this rank's."""
        return (losses.float() * batch.label_shares).sum(), {}


def objective_of(train: TrainConfig) -> Objective:
    """What ``train.loss_normalization`` says: the mean over the batch's tokens, or over its documents."""
    return EverySample() if train.loss_normalization == "sample" else NextToken()
