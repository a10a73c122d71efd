"""A model to ask: logits, losses and continuations of texts, ids and packs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_m1.config import Config
from megatron_m1.data.packed import PackedSample
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.generate.sampler import generate
from megatron_m1.generate.sampling import Sampling
from megatron_m1.layers.head import token_losses
from megatron_m1.layers.pack import PackedBatchParams
from megatron_m1.library.inputs import Form, Ids, Input, Inputs, Pass, Reader, passes
from megatron_m1.parallel.layout import SequenceLayout
from megatron_m1.plan.parameters import ParameterCounts, parameter_counts
from megatron_m1.runtime.alone import default_group


@dataclass(frozen=True)
class Generation:
    """What continues a prompt."""

    ids: list[int]
    """The new tokens, without the one that ended them."""
    text: str | None
    """The same as text; None without a tokenizer."""


class Model:
    """A whole model on one device, as ``megatron_m1.load`` returns it, in evaluation mode.

    It drops no token and needs no process group; several live beside each other, and beside a run that trains in this
    process. Nothing asks for a gradient; after ``model.module.requires_grad_()``, ``logits`` and ``loss`` can be
    differentiated.

    Texts, ids and packs may be given wherever ``Inputs`` are: one of them, or a list of several. Ids are integers, as a
    list or a tensor [n]; a tensor [sequences, n] is several. Documents of a pack, and several inputs, don't see each
    other. Whatever is wrong with them raises ``ValueError`` with one line.
    """

    def __init__(self, module: GPTModel, config: Config, tokenizer: Tokenizer | str, origin: str) -> None:
        """
        Args:
            module: of ``model.whole``, filled.
            config: of the run, or Megatron's words for what a Hugging Face folder says of the model.
            tokenizer: its tokenizer or, without one, the line that says so to who gives a text.
            origin: where it is from, for its representation.
        """
        self.module = module
        """megatron-core's ``GPTModel``, a torch module; to call it, see ``logits`` and ``loss``."""
        self.config = config
        self._tokenizer = tokenizer
        self._origin = origin

    def __repr__(self) -> str:
        size = f"{self.parameter_counts.total:,} parameters"
        return f"<Model {self._origin}: {size}, {str(self.dtype)[6:]} on {self.device}>"

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of texts; None if it has none."""
        return None if isinstance(self._tokenizer, str) else self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        device: torch.device = self.module.output_layer.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of parameters and products; routers and an FP32 head are fp32 whatever it is."""
        dtype: torch.dtype = self.module.embedding.word_embeddings.weight.dtype
        return dtype

    @cached_property
    def parameter_counts(self) -> ParameterCounts:
        """How many parameters there are, by kind and by layer."""
        return parameter_counts(self.config.model)

    @property
    def _reader(self) -> Reader:
        return Reader(self._tokenizer, self.config.model.vocab_size)

    @contextmanager
    def _running(self) -> Iterator[None]:
        on_its_gpu = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with default_group(), on_its_gpu:
            yield

    @overload
    def logits(self, inputs: Input) -> Tensor: ...  # type: ignore[overload-overlap]

    @overload
    def logits(self, inputs: Iterable[Input]) -> list[Tensor]: ...

    def logits(self, inputs: Inputs) -> Tensor | list[Tensor]:
        """What the model predicts after every token.

        Args:
            inputs: texts, ids or packs, one or several.

        Returns:
            fp32 [n, vocabulary] on the model's device, row i after token i; of several inputs a list, in their order,
            and of a tensor [sequences, n] fp32 [sequences, n, vocabulary].
        """
        given, form = self._reader.read(inputs)
        found: list[Tensor] = []
        with self._running():
            for part in passes(given):
                tokens, params = self._placed(part.pack)
                logits = self.module(tokens, None, None, packed_seq_params=params)[
                    0
                ].float()  # [1, n, vocab] -> [n, vocab]
                found += [logits[start:end] for start, end in part.parts]
        return form.of(found)

    @overload
    def loss(self, inputs: Inputs, *, per_token: Literal[False] = False) -> Tensor: ...

    @overload
    def loss(self, inputs: Input, *, per_token: Literal[True]) -> Tensor: ...  # type: ignore[overload-overlap]

    @overload
    def loss(self, inputs: Iterable[Input], *, per_token: Literal[True]) -> list[Tensor]: ...

    def loss(self, inputs: Inputs, *, per_token: bool = False) -> Tensor | list[Tensor]:
        """Negative log-likelihood of the next tokens in nats, as training and validation have it.

        Texts and ids predict their own tokens but the first. Packs have labels and say which of them count.

        Args:
            inputs: texts, ids or packs, one or several.
            per_token: return the loss of every token instead of their mean.

        Returns:
            The mean over all predicted tokens of all inputs, a fp32 scalar. With ``per_token`` fp32 [n - 1] of a text
            or ids, entry i of token i + 1; of a pack fp32 [n], entry i of label i, 0 where it does not count; of
            several inputs a list, and of a tensor [sequences, n] fp32 [sequences, n - 1].

        Raises:
            ValueError: besides, no token is predicted.
        """
        given, form = self._reader.read(inputs)
        found: list[Tensor] = []
        weight = 0.0
        with self._running():
            for part in passes(given):
                weight += float(part.pack.loss_mask.sum())
                found += self._losses(part)
        if per_token:
            return form.of(found)
        if weight == 0:
            raise ValueError("nothing is predicted: give a sequence of 2 tokens or more")
        return torch.stack([losses.sum().double() for losses in found]).sum().div(weight).float()

    def _losses(self, part: Pass) -> list[Tensor]:
        tokens, params = self._placed(part.pack)
        labels, mask = part.pack.labels.to(self.device)[None], part.pack.loss_mask.to(self.device)
        # Losses of labels that don't count may be anything, and so may the labels.
        losses = token_losses(self.module, tokens, labels.where(mask != 0, -1), params)[0] * mask
        return [losses[start : end if part.has_last_label else end - 1] for start, end in part.parts]

    def _placed(self, pack: PackedSample) -> tuple[Tensor, PackedBatchParams]:
        layout = SequenceLayout.build(pack.cu_seqlens.cpu()).to(self.device)
        return pack.tokens.to(self.device)[None], PackedBatchParams.of(layout)

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: str | Ids,
        *,
        max_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
        chunk_tokens: int = ...,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Iterable[str | Ids],
        *,
        max_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
        chunk_tokens: int = ...,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | Ids | Iterable[str | Ids],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 1234,
        chunk_tokens: int = 2048,
    ) -> Generation | list[Generation]:
        """Continue prompts until the tokenizer's end of a document, or ``max_tokens``.

        Args:
            prompts: texts or ids, one or several; of any lengths, run together and without padding.
            max_tokens: new tokens of each, at most.
            temperature: logits are divided by it; 0 takes the most likely token.
            top_p: tokens are drawn from the fewest most likely ones that have this much probability together.
            seed: of the draws; what is drawn for a prompt does not depend on those that follow it.
            chunk_tokens: prompt tokens of a forward pass.

        Returns:
            A continuation; of several prompts a list, in their order.

        Raises:
            ValueError: besides, a number is out of range, or logits are not finite.
        """
        tokenizer = self.tokenizer
        sampling = Sampling(max_tokens, temperature, top_p, seed, chunk_tokens, tokenizer.eod if tokenizer else None)
        sampling.check()
        given, form = self._reader.read_sequences(prompts)
        with self._running():
            ids = _collected(generate(self.module, given, sampling), len(given))
        done = [Generation(new, tokenizer.decode(new) if tokenizer else None) for new in ids]
        return done[0] if form is Form.ONE else done


def _collected(steps: Iterator[dict[int, int]], sequences: int) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in range(sequences)]
    for tokens in steps:
        for sequence, token in tokens.items():
            ids[sequence].append(token)
    return ids
