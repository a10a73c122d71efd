"""What a model is asked about: texts, ids or packs, one or several, as passes of whole packs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_m1.convert.tokenizer import check_rows
from megatron_m1.data.packed import PackedSample
from megatron_m1.data.tokenizers import Tokenizer

type Ids = Sequence[int] | Tensor
"""Token ids of one sequence: a list or the like, or an integer tensor [n]."""
type Input = str | Ids | PackedSample
type Inputs = Input | Iterable[Input]

EMPTY = "the input is empty: give a text, ids or a pack, or a list of them"
PASS_TOKENS = 8192
"""Short sequences are run together until they have so many tokens; a longer one is run whole."""


class Form(Enum):
    """What the answer to inputs is."""

    ONE = auto()
    """That of the only input."""
    LIST = auto()
    """One of each input."""
    STACKED = auto()
    """The same as one tensor, for inputs that were one."""

    def of(self, answers: list[Tensor]) -> Tensor | list[Tensor]:
        """Put the answers to all inputs into this form."""
        if self is Form.LIST:
            return answers
        return answers[0] if self is Form.ONE else torch.stack(answers)


@dataclass(frozen=True)
class Reader:
    """Turns what a user gives into tokens that the model has.

    Args:
        tokenizer: of texts or, where there is none, a line that says so.
        vocab_size: rows of the embedding.
    """

    tokenizer: Tokenizer | str
    vocab_size: int

    def read(self, given: Inputs) -> tuple[list[list[int] | PackedSample], Form]:
        """Read one input or several.

        Returns:
            The ids of each sequence, or the pack, and what the answers are to be like.

        Raises:
            ValueError: there is nothing, an id that the model does not have, or a text without a tokenizer.
        """
        if isinstance(given, str | PackedSample):
            return [self._read_one(given)], Form.ONE
        if isinstance(given, Tensor):
            values = _values(given, dimensions=(1, 2))
            if not values:
                raise ValueError(EMPTY)
            if given.dim() == 1:
                return [self._read_one(values)], Form.ONE
            return [self._read_one(row) for row in values], Form.STACKED
        _check_kind(given)
        items = list(given)
        if not items:
            raise ValueError(EMPTY)
        if _is_id(items[0]):
            return [self._read_one(items)], Form.ONE
        return [self._read_one(item) for item in items], Form.LIST

    def read_sequences(self, given: Inputs) -> tuple[list[list[int]], Form]:
        """Read texts or ids; as ``read``.

        Raises:
            ValueError: besides, a pack is among them.
        """
        read, form = self.read(given)
        sequences = [item for item in read if isinstance(item, list)]
        if len(sequences) < len(read):
            raise ValueError("a pack can't be continued: give the ids of one of its documents")
        return sequences, form

    def _read_one(self, given: Any) -> list[int] | PackedSample:
        if isinstance(given, PackedSample):
            self._check_pack(given)
            return given
        if isinstance(given, str):
            if isinstance(self.tokenizer, str):
                raise ValueError(self.tokenizer)
            ids = self.tokenizer.encode(given)
        else:
            _check_kind(given)
            values = _values(given, dimensions=(1,)) if isinstance(given, Tensor) else given
            try:
                ids = [operator.index(token) for token in values]
            except TypeError as error:
                raise ValueError(f"an input holds something other than ids ({error}): give integers") from error
        if not ids:
            raise ValueError("a sequence is empty: this model has no begin mark, give at least one token")
        self._check_ids(min(ids), max(ids))
        return ids

    def _check_ids(self, smallest: int, largest: int) -> None:
        if smallest < 0 or largest >= self.vocab_size:
            wrong = smallest if smallest < 0 else largest
            if not isinstance(self.tokenizer, str):
                check_rows(self.tokenizer.vocab_size, self.vocab_size, "of these texts")
            raise ValueError(f"id {wrong} is not among the model's {self.vocab_size}: it is another tokenizer's")

    def _check_pack(self, pack: PackedSample) -> None:
        tokens = len(pack.tokens)
        if not tokens or int(pack.cu_seqlens[-1]) != tokens:
            raise ValueError(f"a pack of {tokens} tokens has cu_seqlens that end at {int(pack.cu_seqlens[-1])}")
        for name in ("labels", "loss_mask"):
            if len(getattr(pack, name)) != tokens:
                raise ValueError(f"a pack of {tokens} tokens has {len(getattr(pack, name))} {name}: give one a token")
        predicted = pack.labels[pack.loss_mask != 0]
        both = torch.cat((pack.tokens, predicted))
        self._check_ids(int(both.min()), int(both.max()))


def _values(ids: Tensor, *, dimensions: tuple[int, ...]) -> list[Any]:
    is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() not in dimensions or not is_integer:
        shapes = "[n], or [sequences, n]" if 2 in dimensions else "[n]"
        raise ValueError(f"ids are {ids.dtype} of shape {list(ids.shape)}: give integers of shape {shapes}")
    if ids.is_meta or ids.layout != torch.strided:
        raise ValueError(f"ids are on {ids.device} with layout {ids.layout}: give a dense tensor that has its values")
    return ids.tolist()


def _check_kind(given: Any) -> None:
    """Refuse what can be iterated, but not into ids: the keys of what a tokenizer of transformers returns, or bytes."""
    if isinstance(given, Mapping):
        raise ValueError(
            f"an input is of type {type(given).__name__}: give its ids by themselves, such as x['input_ids']"
        )
    # An array without dimensions says that it can be iterated, and can't.
    wrong = isinstance(given, bytes | bytearray | Set) or getattr(given, "ndim", 1) == 0
    if wrong or not isinstance(given, Iterable):
        raise ValueError(f"an input is of type {type(given).__name__}: give a text, ids or a pack, or a list of them")


def _is_id(item: Any) -> bool:
    # Arrays and tensors offer an index whatever their shape is.
    return getattr(item, "ndim", 0) == 0 and hasattr(item, "__index__")


@dataclass(frozen=True)
class Pass:
    """One forward pass, and which of its tokens belong to which input."""

    pack: PackedSample
    parts: list[tuple[int, int]]
    """[start, end) of each input, in their order."""
    has_last_label: bool
    """Whether the last token of an input has a label of its own, as in packs."""


def passes(inputs: Sequence[list[int] | PackedSample]) -> Iterator[Pass]:
    """Deal inputs out to passes, in their order: packs one by one, sequences as documents of a pack.

    A sequence's labels are its own next tokens; its last token has none.
    """
    waiting: list[list[int]] = []
    for item in inputs:
        tokens = len(item) if isinstance(item, list) else PASS_TOKENS
        if waiting and sum(map(len, waiting)) + tokens > PASS_TOKENS:
            yield _documents(waiting)
            waiting = []
        if isinstance(item, PackedSample):
            yield Pass(item, [(0, len(item.tokens))], has_last_label=True)
        else:
            waiting.append(item)
    if waiting:
        yield _documents(waiting)


def _documents(sequences: Sequence[list[int]]) -> Pass:
    bounds = [0]
    for ids in sequences:
        bounds.append(bounds[-1] + len(ids))
    tokens = torch.tensor([token for ids in sequences for token in ids])
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    loss_mask = torch.ones(len(tokens))
    loss_mask[cu_seqlens[1:].long() - 1] = 0.0
    pack = PackedSample(tokens, tokens.roll(-1), loss_mask, cu_seqlens)
    return Pass(pack, list(pairwise(bounds)), has_last_label=False)
