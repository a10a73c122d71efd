"""The language-model head, in FP32 or in the model's precision, and the loss that it computes chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_m1.layers.engine import EngineConfig
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.parallel.vocab_head import vocab_logits, vocab_parallel_choice, vocab_parallel_loss


class OutputLayer(tensor_parallel.ColumnParallelLinear):
    """Vocabulary-parallel head: logits, or the loss without the logits of the whole sequence.

    With ``lm_head_precision`` fp32, weight, products and logits are fp32 in a bf16 model too, with TF32 off. MiniMax-M1
    needed that for RL: the correlation of training and inference probabilities rose from 0.987 to 0.997 (MiniMax-M1
    report, arXiv 2506.13585, section 3.2). With bf16, weight and products are in ``params_dtype``.
    """

    config: EngineConfig

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Logits of this rank's share of the vocabulary or, with labels, the loss of every token.

        Args:
            input_: [n / tp, 1, hidden], any float dtype: tokens are split over tensor ranks (sequence parallelism).
            weight: must be None: the head is not tied to the embedding.
            runtime_gather_output: gather the logits of all tensor ranks.
            labels: int [1, n]: 0 to vocab - 1, or negative for a token without one, whose loss is 0.

        Returns:
            Without labels: [n, 1, vocab / tp] (or vocab) in the weight's dtype; with: fp32 [1, n]. And no bias.
        """
        assert weight is None and (self.sequence_parallel or self.tp_group.size() == 1)
        ieee_fp32 = self.config.model.lm_head_precision == "fp32"
        if labels is not None:
            # [n / tp, 1, hidden] -> [n / tp, hidden]; [1, n] -> [n]
            loss = vocab_parallel_loss(
                input_.squeeze(1),
                self.weight,
                labels.squeeze(0),
                group=self.tp_group,
                chunk_bytes=self.config.lm_head_chunk_bytes,
                ieee_fp32=ieee_fp32,
            )
            return loss.unsqueeze(0), None
        if self.sequence_parallel:
            input_ = tensor_parallel.gather_from_sequence_parallel_region(input_, group=self.tp_group)
        # [n, 1, hidden] -> [n, hidden] -> [n, vocab / tp] -> [n, 1, vocab / tp]
        logits = vocab_logits(input_.to(self.weight.dtype).squeeze(1), self.weight, ieee_fp32=ieee_fp32).unsqueeze(1)
        if runtime_gather_output:
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
        return logits, None

    def choices(self, input_: Tensor, labels: Tensor) -> Tensor:
        """Loss of every token's label and the most likely token, without gradients.

        Args:
            input_: as of ``forward``.
            labels: int [1, n], as of ``forward``.

        Returns:
            fp64 [2, n]: losses in nats, ids (the first of equals).
        """
        loss, choice = vocab_parallel_choice(
            input_.squeeze(1),
            self.weight,
            labels.squeeze(0),
            group=self.tp_group,
            chunk_bytes=self.config.lm_head_chunk_bytes,
            ieee_fp32=self.config.model.lm_head_precision == "fp32",
        )
        return torch.stack((loss.double(), choice.double()))


def _choices_of_output_layer(
    *, hidden_states: Tensor, output_layer: OutputLayer, labels: Tensor, **unused: Any
) -> Tensor:
    return output_layer.choices(hidden_states, labels)


def _loss_of_output_layer(*, hidden_states: Tensor, output_layer: OutputLayer, labels: Tensor, **unused: Any) -> Tensor:
    # unused: what megatron-core hands to every output processor (masks, contexts, its own loss).
    loss, _ = output_layer(hidden_states, labels=labels)
    return loss


def token_losses(
    model: nn.Module,
    tokens: Tensor,
    labels: Tensor,
    params: PackedBatchParams,
    *,
    padding_mask: Tensor | None = None,
    with_choices: bool = False,
) -> Tensor:
    """Run a model (or a pipeline chunk of one) up to the loss of every token, which the head computes in chunks.

    Labels given to the model itself would let megatron-core make the logits of the whole sequence.

    Args:
        model: of ``model.build.build_chunk``, as it is or wrapped.
        tokens: int [1, n].
        labels: int [1, n]: 0 to vocab - 1, or negative for a token without one, whose loss is 0.
        params: the pack's layout.
        padding_mask: bool [1, n], true for tokens that no router counts.
        with_choices: the most likely tokens as well, and no gradients.

    Returns:
        From the last stage fp32 [1, n], nats, or what ``OutputLayer.choices`` returns; from any other what the next one
        takes.
    """
    output: Tensor = model(
        tokens,
        None,
        None,
        labels=labels,
        packed_seq_params=params,
        padding_mask=padding_mask,
        output_processor=_choices_of_output_layer if with_choices else _loss_of_output_layer,
    )
    return output
