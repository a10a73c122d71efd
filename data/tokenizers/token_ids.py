"""What makes ids of texts and texts of ids: one small class a library, none of which knows files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

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
