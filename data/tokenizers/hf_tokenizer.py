"""Hugging Face tokenizer folders: ``tokenizer.json`` exactly as it is, or else what older files are taken for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from megatron_m1.data.tokenizers.cuts import LineCut
from megatron_m1.data.tokenizers.hf_folder import FILE, TokenizerFolder, first_line, read_folder
from megatron_m1.data.tokenizers.hf_older import older_ids
from megatron_m1.data.tokenizers.token_ids import FastIds, SentencePieceIds, TokenIds


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer folder; its ``eos_token`` ends documents. No code of the folder is ever run.

    ``tokenizer.json`` is taken as it is, whichever class ``tokenizer_config.json`` names: transformers 5 builds the
    pre-tokenizer of some classes anew and gives other ids than the model was trained on. What the folder's other files
    say goes on top as in transformers' ``PreTrainedTokenizerFast``: tokens of ``added_tokens_decoder``, or else of
    ``added_tokens.json``, are added or take their flags from there, and named marks are special. Lengths to cut or fill
    up to, and BPE dropout, are left out. Without ``tokenizer.json``, a SentencePiece ``tokenizer.model`` that has all
    tokens is cut by SentencePiece, and the rest is what transformers makes of it.

    Raises:
        OSError: a file can't be read.
        ValueError: it can't be loaded, needs code of its own, contradicts itself, or names no token that ends a
            document; one line.
    """

    def __init__(self, path: Path) -> None:
        folder = read_folder(path)
        self._path = path
        notes = list(folder.notes)
        self._ids: TokenIds
        if FILE in folder.contents:
            backend = _as_it_is(folder, notes)
            self._eod = _end_mark(folder, backend)
            self._ids = FastIds(backend)
        else:
            self._ids, self._eod = older_ids(folder, notes)
        mark = self._ids.decode([self._eod])
        if self._eod in self.encode(mark):
            notes.append(
                f"{path}: a text that spells {mark!r} gets the end mark's id there, as its kind of model has it"
            )
        self._digest = _digest(folder, self._ids)
        self._notes = tuple(notes)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._ids.size

    @property
    def eod(self) -> int:
        """Id of ``eos_token``."""
        return self._eod

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be assumed, one line each."""
        return self._notes

    @property
    def ids(self) -> TokenIds:
        """What makes ids of texts."""
        return self._ids

    @property
    def line_cut(self) -> LineCut | None:
        """Where a text may be cut so that its parts, encoded by themselves, give its ids; None if no place is known."""
        return self._ids.line_cut

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``.

        Raises:
            ValueError: the tokenizer has no id for a part of it and no unknown token.
        """
        with self._one_line():
            return self._ids.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on several cores unless ``TOKENIZERS_PARALLELISM`` is false.

        Raises:
            ValueError: as of :meth:`encode`.
        """
        with self._one_line():
            return self._ids.encode_batch(texts)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tokenizers, which is no Python, raises nothing more special
            raise ValueError(f"{self._path} can't encode a text: {first_line(error)}") from error

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens spelled out."""
        return self._ids.decode(ids)

    def digest(self) -> str:
        """SHA-256 over the tokenizer's files."""
        return self._digest


def _as_it_is(folder: TokenizerFolder, notes: list[str]) -> Backend:
    """The tokenizer of ``tokenizer.json`` with what the folder's other files add."""
    try:
        backend = Backend.from_buffer(folder.contents[FILE])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust is no Exception
        raise ValueError(
            f"{folder.path} holds no tokenizer that transformers can load: {FILE}: {first_line(error)}"
        ) from error
    if not backend.get_vocab_size(with_added_tokens=True):
        raise ValueError(f"{folder.path} holds no tokenizer that transformers can load: {FILE} has no token")
    declared = list(folder.declared_tokens())
    known = {token.content for token, _ in declared if backend.token_to_id(token.content) is not None}
    # At once: after every call the library builds its search for all added tokens anew.
    backend.add_tokens([token for token, _ in declared])
    for token, number in declared:
        received = backend.token_to_id(token.content)
        if token.content not in known and received != number:
            raise ValueError(
                f"{folder.path / folder.declared_in} says that {token.content!r} is id {number}, which {FILE} lacks"
                f" and would count as {received}: put it into {FILE}, or correct its id"
            )
        if received != number:
            notes.append(
                f"{folder.path}: {folder.declared_in} says that {token.content!r} is id {number}, but it is {received}"
                f" as {FILE} says"
            )
        known.add(token.content)
    # The end mark itself has to be there already: an embedding has no row for one that is made up here.
    backend.add_special_tokens([mark for mark in folder.marks() if mark.content != folder.end_mark])
    extra = [mark for mark in folder.extra_marks() if backend.token_to_id(mark.content) is None]
    backend.add_special_tokens(extra)
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
        notes.append(f"{folder.path}: BPE dropout, by which ids are drawn by lot, is left out")
    return backend


def _end_mark(folder: TokenizerFolder, backend: Backend) -> int:
    """The id that ends documents; its token becomes special, so that no text has it."""
    mark = folder.end_mark
    if mark is not None and backend.token_to_id(mark) is None:
        raise ValueError(
            f"{folder.path / folder.end_mark_in}: eos_token {mark!r} is no token of {FILE}, so nothing can end"
            f" documents: name one that is, or add it to {FILE}"
        )
    if mark is None and folder.end_id is not None:
        mark = backend.id_to_token(folder.end_id)
    if mark is None:
        raise ValueError(f"{folder.path} has no eos_token to end documents with; set one in its tokenizer_config.json")
    backend.add_special_tokens([AddedToken(mark, normalized=False, special=True)])
    end = backend.token_to_id(mark)
    assert end is not None
    return end


def _digest(folder: TokenizerFolder, ids: TokenIds) -> str:
    state = hashlib.sha256()
    for name, content in folder.digested().items():
        state.update(f"{name} {len(content)}\n".encode() + content)
    # Corpora made while transformers cut the texts have the digest without these lines, and maybe other ids.
    if isinstance(ids, SentencePieceIds):
        state.update(b"by SentencePiece\n")
    elif FILE in folder.contents and folder.rebuilt_class is not None:
        state.update(f"{FILE} as it is\n".encode())
    return state.hexdigest()
