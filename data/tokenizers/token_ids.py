"""What makes ids of texts and texts of ids: one small class a library, none of which knows files."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers

from megatron_m1.data.tokenizers.cuts import LineCut, hugging_face_cut, sentencepiece_cut


class TokenIds(Protocol):
    """Texts to ids and back, without begin or end marks."""

    @property
    def size(self) -> int:
        """One more than the largest id."""

    @property
    def line_cut(self) -> LineCut | None:
        """Where texts may be cut without a change of ids; None if no place is known."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; marks that are spelled out are text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids; what is no id is left out."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens, as a text would spell them."""

    def encode_placed(self, text: str, *, with_marks: bool) -> PlacedIds:
        """Ids of a text and where they are from, with the ids of ``marks`` that it spells, or else these as text.

        Raises:
            ValueError: the tokenizer can't tell where its ids are from.
        """


@dataclass(frozen=True)
class PlacedIds:
    """Ids of a text, and the characters of which they are made."""

    ids: npt.NDArray[np.int64]
    """[n]."""
    places: npt.NDArray[np.int64]
    """First character and the one after the last [n, 2]. Several ids of one character share it, or the first of them
    have none: their two numbers are then equal."""

    @classmethod
    def joined(cls, parts: Iterable[tuple[int, PlacedIds]]) -> PlacedIds:
        """Ids of texts end to end, from the place of each and its ids."""
        found = [(start, part) for start, part in parts if part.ids.size]
        if not found:
            return cls(np.empty(0, np.int64), np.empty((0, 2), np.int64))
        return cls(
            np.concatenate([part.ids for _, part in found]),
            np.concatenate([start + part.places for start, part in found]),
        )


class FastIds:
    """A tokenizer of the tokenizers library, set to leave out no text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._size = 1 + max(backend.get_vocab(with_added_tokens=True).values())

    @property
    def size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._size

    @property
    def line_cut(self) -> LineCut | None:
        """By the tokenizer's parts, see ``cuts``."""
        backend = self._backend
        # To pickle a part is to spell it as tokenizer.json does.
        normalizer, pre_tokenizer = (
            None if part is None else json.loads(part.__getstate__())
            for part in (backend.normalizer, backend.pre_tokenizer)
        )
        return hugging_face_cut(normalizer, pre_tokenizer, list(backend.get_added_tokens_decoder().values()))

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on several cores unless ``TOKENIZERS_PARALLELISM`` is false."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens spelled out."""
        known = [number for number in ids if 0 <= number < self._size]
        return str(self._backend.decode(known, skip_special_tokens=False))

    @property
    def marks(self) -> tuple[str, ...]:
        """Contents of special added tokens."""
        return tuple(token.content for token in self._backend.get_added_tokens_decoder().values() if token.special)

    def encode_placed(self, text: str, *, with_marks: bool) -> PlacedIds:
        """Ids of a text and where they are from."""
        self._backend.encode_special_tokens = not with_marks
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = True
        return PlacedIds(np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2))


class PythonIds:
    """A tokenizer of transformers that is no wrapper of the tokenizers library."""

    def __init__(self, tokenizer: Any) -> None:
        # No warning about documents longer than some model's context: they are cut into packs later.
        tokenizer.model_max_length = 1 << 62
        self._tokenizer = tokenizer
        self._size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))

    @property
    def size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._size

    @property
    def line_cut(self) -> LineCut | None:
        """None: what its Python does is not known."""
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, one by one."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens spelled out."""
        known = [number for number in ids if 0 <= number < self._size]
        return str(self._tokenizer.decode(known, clean_up_tokenization_spaces=False))

    @property
    def marks(self) -> tuple[str, ...]:
        """Its special tokens."""
        return tuple(self._tokenizer.all_special_tokens)

    def encode_placed(self, text: str, *, with_marks: bool) -> PlacedIds:
        """Refused."""
        raise ValueError(
            f"{type(self._tokenizer).__name__} can't tell which characters an id is made of, which conversations need:"
            " save the tokenizer as tokenizer.json"
        )


class SentencePieceIds:
    """A SentencePiece model."""

    def __init__(self, content: bytes) -> None:
        """Load the content of a ``.model`` file.

        Raises:
            RuntimeError: it is none.
        """
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except OSError as error:
            raise RuntimeError(str(error)) from error

    @property
    def size(self) -> int:
        """Number of pieces."""
        return int(self.processor.vocab_size())

    @property
    def line_cut(self) -> LineCut | None:
        """By the model's kind and pieces, see ``cuts``."""
        proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        return sentencepiece_cut(proto.ModelProto.FromString(self.processor.serialized_model_proto()))

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on one core."""
        ids: list[list[int]] = self.processor.encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids; marks are left out."""
        size = self.size
        return str(self.processor.decode([number for number in ids if 0 <= number < size]))

    @property
    def marks(self) -> tuple[str, ...]:
        """Control pieces, which no text gets otherwise."""
        model = self.processor
        return tuple(str(model.id_to_piece(i)) for i in range(self.size) if model.is_control(i))

    def encode_placed(self, text: str, *, with_marks: bool) -> PlacedIds:
        """Ids of a text and where they are from."""
        pieces = re.split(f"({'|'.join(map(re.escape, self.marks))})", text) if with_marks and self.marks else [text]
        parts, start = [], 0
        for number, piece in enumerate(pieces):
            # Every second one is a mark.
            parts.append((start, self._mark(piece) if number % 2 else self._text(piece)))
            start += len(piece)
        return PlacedIds.joined(parts)

    def _mark(self, piece: str) -> PlacedIds:
        return PlacedIds(np.array([self.processor.piece_to_id(piece)], np.int64), np.array([[0, len(piece)]], np.int64))

    def _text(self, text: str) -> PlacedIds:
        proto: Any = importlib.import_module("sentencepiece.sentencepiece_pb2")
        found = proto.SentencePieceText.FromString(self.processor.encode(text, out_type="serialized_proto")).pieces
        starts = (np.frombuffer(text.encode("utf-8"), np.uint8) & 0xC0) != 0x80
        # [bytes + 1]: how many characters begin before each byte
        characters = np.concatenate(([0], np.cumsum(starts, dtype=np.int64)))
        places = characters[np.array([(piece.begin, piece.end) for piece in found], np.int64).reshape(-1, 2)]
        return PlacedIds(np.array([piece.id for piece in found], np.int64), places)
