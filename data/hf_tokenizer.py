"""Hugging Face tokenizer folders: ``tokenizer.json`` exactly as it is, or what transformers makes of older files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from megatron_m1.data.hf_folder import FILE, TokenizerFolder, read_folder


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer folder; its ``eos_token`` ends documents. No code of the folder is ever run.

    ``tokenizer.json`` is taken as it is, whichever class ``tokenizer_config.json`` names: transformers 5 builds the
    pre-tokenizer of some classes anew and gives other ids than the model was trained on. What the folder's other files
    say goes on top as in transformers' ``PreTrainedTokenizerFast``: tokens of ``added_tokens_decoder``, or else of
    ``added_tokens.json``, are added or take their flags from there, and named marks are special. Lengths to cut or fill
    up to, and BPE dropout, are left out. A folder without ``tokenizer.json`` is loaded by transformers.

    Raises:
        ValueError: it can't be loaded, needs code of its own, contradicts itself, or names no token that ends a
            document; one line.
    """

    def __init__(self, path: Path) -> None:
        folder = read_folder(path)
        self._path = path
        self._ids: _Ids
        notes = list(folder.notes)
        if FILE in folder.contents:
            backend = _as_it_is(folder, notes)
            self._eod = _end_mark(folder, backend)
            self._ids = _FastIds(backend)
        else:
            self._ids, self._eod = _by_transformers(folder, notes)
        mark = self._ids.decode([self._eod])
        if self._eod in self.encode(mark):
            notes.append(
                f"{path}: a text that spells {mark!r} gets the end mark's id there: its kind of model knows no other"
            )
        self._vocab_size = 1 + max(self._ids.all_ids())
        self._digest = _digest(folder)
        self._notes = tuple(notes)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocab_size

    @property
    def eod(self) -> int:
        """Id of ``eos_token``."""
        return self._eod

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be assumed, one line each."""
        return self._notes

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``.

        Raises:
            ValueError: the tokenizer has no id for a part of it and no unknown token.
        """
        try:
            return self._ids.encode(text)
        except Exception as error:  # tokenizers, which is no Python, raises nothing more special
            raise ValueError(f"{self._path} can't encode a text: {_first_line(error)}") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on several cores unless ``TOKENIZERS_PARALLELISM`` is false.

        Raises:
            ValueError: as of :meth:`encode`.
        """
        try:
            return self._ids.encode_batch(texts)
        except Exception as error:
            raise ValueError(f"{self._path} can't encode a text: {_first_line(error)}") from error

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens spelled out."""
        return self._ids.decode([number for number in ids if 0 <= number < self._vocab_size])

    def digest(self) -> str:
        """SHA-256 over the tokenizer's files."""
        return self._digest


class _Ids(Protocol):
    """What makes ids of texts, and texts of ids."""

    def all_ids(self) -> set[int]:
        """Every id there is."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without marks."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of several."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids below the vocabulary's size."""


class _FastIds:
    """A tokenizer of the tokenizers library, set to leave no text out."""

    def __init__(self, backend: Backend) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend

    def all_ids(self) -> set[int]:
        return set(self._backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))


class _PythonIds:
    """A tokenizer of transformers that is no wrapper of the tokenizers library."""

    def __init__(self, tokenizer: Any) -> None:
        # No warning about documents longer than some model's context: they are cut into packs later.
        tokenizer.model_max_length = 1 << 62
        self._tokenizer = tokenizer

    def all_ids(self) -> set[int]:
        return {len(self._tokenizer) - 1, *self._tokenizer.get_vocab().values()}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _as_it_is(folder: TokenizerFolder, notes: list[str]) -> Backend:
    """The tokenizer of ``tokenizer.json`` with what the folder's other files add."""
    try:
        backend = Backend.from_buffer(folder.contents[FILE])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust is no Exception
        raise ValueError(
            f"{folder.path} holds no tokenizer that transformers can load: {FILE}: {_first_line(error)}"
        ) from error
    if not backend.get_vocab_size(with_added_tokens=True):
        raise ValueError(f"{folder.path} holds no tokenizer that transformers can load: {FILE} has no token")
    for token, number in folder.declared_tokens():
        known = backend.token_to_id(token.content)
        if known is None:
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != number:
                raise ValueError(
                    f"{folder.path / folder.declared_in} says that {token.content!r} is id {number}, which {FILE} lacks"
                    f" and would count as {backend.token_to_id(token.content)}: put it into {FILE}, or correct its id"
                )
            continue
        if known != number:
            notes.append(
                f"{folder.declared_in} says that {token.content!r} is id {number}; it is {known}, as in {FILE}"
            )
        backend.add_tokens([token])
    # The end mark itself has to be there already: an embedding has no row for one that is made up here.
    backend.add_special_tokens([mark for mark in folder.marks() if mark.content != folder.end_mark])
    extra = [mark for mark in folder.extra_marks() if backend.token_to_id(mark.content) is None]
    backend.add_special_tokens(extra)
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
        notes.append(f"{FILE} asks for BPE dropout, by which a text's ids are drawn by lot: it is left out")
    return backend


def _end_mark(folder: TokenizerFolder, backend: Backend) -> int:
    """The id that ends documents; its token becomes special, so that no text has it."""
    mark = folder.end_mark
    if mark is not None and backend.token_to_id(mark) is None:
        raise ValueError(
            f"{folder.path / folder.end_mark_in}: eos_token {mark!r} is no token of {FILE}, so nothing can end"
            f" documents: name one that is, or add it to {FILE}"
        )
    if mark is None and folder.end_id is not None and folder.end_id >= 0:
        mark = backend.id_to_token(folder.end_id)
    if mark is None:
        raise ValueError(f"{folder.path} has no eos_token to end documents with; set one in its tokenizer_config.json")
    backend.add_special_tokens([AddedToken(mark, normalized=False, special=True)])
    end: int = backend.token_to_id(mark)
    return end


def _by_transformers(folder: TokenizerFolder, notes: list[str]) -> tuple[_Ids, int]:
    """What transformers makes of a folder without ``tokenizer.json``."""
    if folder.own_code is not None:
        raise ValueError(
            f"{folder.path} has no {FILE}, and its tokenizer is code of its own ({folder.own_code}), which is never"
            f" run: save it as {FILE} where you trust that code"
        )
    # Importing transformers takes seconds, which only those who use such a folder should wait.
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            str(folder.path), local_files_only=True, trust_remote_code=False
        )
        eod = tokenizer.eos_token_id
    except Exception as error:  # its loaders raise nearly anything
        raise ValueError(
            f"{folder.path} holds no tokenizer that transformers can load: {_first_line(error)}"
        ) from error
    if eod is None:
        raise ValueError(f"{folder.path} has no eos_token to end documents with; set one in its tokenizer_config.json")
    notes.append(
        f"{folder.path} has no {FILE}: taken to be what transformers {transformers.__version__} makes of"
        f" {' and '.join(folder.vocabulary_files()) or 'no vocabulary'} for {type(tokenizer).__name__}"
    )
    return _FastIds(tokenizer.backend_tokenizer) if tokenizer.is_fast else _PythonIds(tokenizer), int(eod)


def _digest(folder: TokenizerFolder) -> str:
    state = hashlib.sha256()
    for name, content in folder.digested().items():
        state.update(f"{name} {len(content)}\n".encode() + content)
    if FILE in folder.contents and folder.rebuilt_class is not None:
        # Corpora made while transformers cut the text have the digest without this, and maybe other ids.
        state.update(f"{FILE} as it is\n".encode())
    return state.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
